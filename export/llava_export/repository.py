"""Fills a model repository, or leaves the old one as it is."""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_export import manifest
from llava_export.errors import ExportError
from llava_export.progress import step
from llava_export.source import Source, checkpoint_files, find_checkpoint
from llava_triton.checkpoint.weights import CheckpointError
from llava_triton.contract import settings as settings_module
from llava_triton.contract.settings import Settings

if TYPE_CHECKING:
    from llava_export.encoder import Checkpoint

_CHECKOUT = Path(__file__).resolve().parents[2] / "model_repository"
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "llava-triton" / "model_repository"
SOURCES = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED
"""Configurations and model.py files: beside this package in a checkout, where the wheel puts them
elsewhere."""


@dataclass(frozen=True)
class ExportJob:
    """What the user asks for."""

    model: str
    """A checkpoint's directory or hub name, the latter perhaps with a revision: NAME@REVISION."""
    output: Path
    """The repository to fill or to fill anew."""
    target: str = "cpu"
    """"gpu" where Triton has its TensorRT backend, "cpu" elsewhere."""
    precision: str = "fp32"
    """"fp32" or, for a GPU, "fp16"."""
    compute_capability: str | None = None
    """Of the GPU to build for; None for this machine's."""
    copy: bool = False
    """Copy the checkpoint into the repository instead of linking it."""
    settings: Settings = field(default_factory=Settings)


def export(job: ExportJob) -> bool:
    """Fill `job.output` from the checkpoint.

    Returns:
        False where it was up to date already.

    Raises:
        ExportError: it cannot be done; `job.output` is as it was.
    """
    source = find_checkpoint(job.model)
    checkpoint = source.directory
    _check_output(job.output, checkpoint)
    made_from = _fingerprint(job, source)
    if manifest.is_current(job.output, made_from):
        return False
    output = job.output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent)
    except OSError as error:
        raise ExportError(f"{job.output} cannot be written: {error.strerror}") from error
    with scratch as folder:
        filled = Path(folder) / "new"
        try:
            _fill(job, source, filled)
            manifest.write(filled, made_from)
            _swap(filled, output, aside=Path(folder) / "old")
        except CheckpointError as error:
            raise ExportError(str(error)) from error
        except OSError as error:
            raise ExportError(f"{job.output} cannot be written: {error}") from error
    return True


def _fingerprint(job: ExportJob, source: Source) -> dict[str, Any]:
    shared = Path(settings_module.__file__).parents[1]
    code = [
        *Path(__file__).parent.glob("*.py"),
        shared / "contract" / "settings.py",
        *(shared / "checkpoint").rglob("*.py"),
    ]
    templates = [
        path for path in SOURCES.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    checkpoint = source.directory
    options = asdict(job) | {"model": str(checkpoint), "output": None}
    options["hub"] = None if source.name is None else {"name": source.name, "commit": source.commit}
    if job.target == "gpu" and job.compute_capability is None:
        from llava_export.tensorrt_engine import local_compute_capability

        options["compute_capability"] = local_compute_capability()
    return manifest.fingerprint(
        checkpoint_files(checkpoint), sorted(code) + sorted(templates), options
    )


def _check_output(output: Path, checkpoint: Path) -> None:
    """Refuse to replace anything that an export has not made, or that it reads."""
    if checkpoint.is_relative_to(output.resolve()):
        raise ExportError(
            f"the checkpoint {checkpoint} lies inside {output}, which the export replaces; "
            "name another directory for the model repository"
        )
    if output.exists() and not (output / manifest.FILE_NAME).is_file():
        if not output.is_dir():
            raise ExportError(f"{output} is a file; name a directory for the model repository")
        if any(output.iterdir()):
            raise ExportError(
                f"{output} holds something other than an exported model repository, which would "
                "be lost; name another directory or empty this one"
            )


def _fill(job: ExportJob, source: Source, filled: Path) -> None:
    # Imported here: an export that is up to date must not wait for PyTorch.
    from llava_export.configuration import VISION_ENCODER, VisionServing, configure
    from llava_export.encoder import EncoderBuild

    with step("reading the checkpoint"):
        checkpoint = _read_checkpoint(source)
        build = EncoderBuild(
            checkpoint,
            precision=job.precision,
            max_batch=job.settings.vision_max_batch,
            target=job.target,
            compute_capability=job.compute_capability,
        )
    shutil.copytree(SOURCES, filled, ignore=shutil.ignore_patterns("__pycache__", ".gitkeep"))
    serving = VisionServing(
        input_shape=build.metadata.input_shape,
        output_shape=build.metadata.output_shape,
        on_tensorrt=job.target == "gpu",
    )
    for config in filled.glob("*/config.pbtxt"):
        config.write_text(configure(config.read_text(), job.settings, serving))
        (config.parent / "1").mkdir(exist_ok=True)  # Triton wants one, of ensembles too
    if serving.on_tensorrt:
        (filled / VISION_ENCODER / "1" / "model.py").unlink()
    (filled / settings_module.FILE_NAME).write_text(job.settings.to_json())
    processor = filled / "image_encoder" / "1" / "processor"
    checkpoint.image_processor.save_pretrained(processor)
    if checkpoint.video_processor is not None:
        checkpoint.video_processor.save(processor)
    _place_checkpoint(
        source.directory, filled / "language_model" / "1" / "checkpoint", copy=job.copy
    )
    version_folder = Path(VISION_ENCODER) / "1"
    report = build.make(filled / version_folder, previous=job.output / version_folder)
    if report is not None:
        print(report.table())
    if build.is_for_rtx:
        print(
            "  note: this plan is for TensorRT for RTX; Triton's TensorRT backend loads only plans "
            "of its own TensorRT: to serve, export in NVIDIA's Triton container"
        )


def _read_checkpoint(source: Source) -> Checkpoint:
    from llava_export.encoder import Checkpoint
    from llava_triton.checkpoint.configuration import llava_config
    from llava_triton.checkpoint.families import VideoFamily, family_of
    from llava_triton.checkpoint.image_processor import load_image_processor
    from llava_triton.checkpoint.tokenizer import check_video_template, load_tokenizer
    from llava_triton.checkpoint.video_processor import load_video_processor
    from llava_triton.checkpoint.weights import CheckpointWeights

    directory = source.directory
    config = llava_config(directory, source.name)
    weights = CheckpointWeights(directory)
    tokenizer = load_tokenizer(directory)  # the server will need it, and its chat template
    video_processor = None
    if isinstance(family_of(config), VideoFamily):
        check_video_template(directory, tokenizer, config)
        video_processor = load_video_processor(directory)
    return Checkpoint(config, weights, load_image_processor(directory), video_processor)


def _place_checkpoint(directory: Path, place: Path, *, copy: bool) -> None:
    if not copy:
        place.symlink_to(directory, target_is_directory=True)
        return
    place.mkdir()
    with step("copying the checkpoint"):
        for file in checkpoint_files(directory):
            shutil.copyfile(file, place / file.name)


def _swap(filled: Path, output: Path, *, aside: Path) -> None:
    """Put `filled` in the place of `output`, which goes to `aside`."""
    if output.exists():
        output.rename(aside)
    try:
        filled.rename(output)
    except OSError:
        if aside.exists():
            aside.rename(output)
        raise
