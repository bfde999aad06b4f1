"""Makes the vision encoder's file and its report, or finds that the last one still fits."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from llava_export import artifact
from llava_export.artifact import EncoderMetadata
from llava_export.gpu_runner import engine_encoder
from llava_export.mixed_precision import to_mixed_precision
from llava_export.onnx_export import export_onnx
from llava_export.progress import step
from llava_export.report import Encode, Report, compare, onnx_encoder
from llava_export.tensorrt_engine import (
    RTX,
    build_engine,
    check_capability,
    find_tensorrt,
    local_compute_capability,
)
from llava_triton.checkpoint import vision_tower
from llava_triton.checkpoint.families import Config, VideoFamily, family_of
from llava_triton.checkpoint.video_processor import VideoProcessor
from llava_triton.checkpoint.vision_tower import VisionEncoder, features_shape, load_vision_encoder
from llava_triton.checkpoint.weights import CheckpointError, CheckpointWeights

REPORT = "report.json"
_GRAPH_SOURCES = ("mixed_precision.py", "onnx_export.py", "tensorrt_engine.py")
_GRAPH_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Checkpoint:
    """What the export reads of a checkpoint."""

    config: Config
    weights: CheckpointWeights
    image_processor: Any
    video_processor: VideoProcessor | None
    """None where its family takes no videos."""


class EncoderBuild:
    """One vision encoder to be made.

    Args:
        checkpoint: whose encoder.
        precision: "fp32", or "fp16" for an engine.
        max_batch: the largest batch that is served.
        target: "cpu" for an ONNX graph, "gpu" for a TensorRT plan.
        compute_capability: of the GPU to build for; None for this machine's.

    Raises:
        ExportError: no TensorRT, or none that builds for that GPU.
        CheckpointError: the checkpoint's parts do not fit one another.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: str,
        max_batch: int,
        target: str,
        compute_capability: str | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._tensorrt: ModuleType | None = None
        capability = None
        builder, builder_version = "torch", version("torch")
        if target == "gpu":
            self._tensorrt = find_tensorrt()
            capability = check_capability(self._tensorrt, compute_capability)
            builder, builder_version = self._tensorrt.__name__, self._tensorrt.__version__
        side = image_side(checkpoint.image_processor)
        output_shape = features_shape(checkpoint.config, side)
        family = family_of(checkpoint.config)
        fault = family.fault(checkpoint.image_processor, output_shape[0])
        if fault is None and isinstance(family, VideoFamily):
            assert checkpoint.video_processor is not None
            fault = family.video_fault(checkpoint.video_processor.output)
        if fault is not None:
            raise CheckpointError(f"{checkpoint.weights.directory} cannot be served: {fault}")
        self.metadata = EncoderMetadata(
            format="onnx" if self._tensorrt is None else "tensorrt",
            builder=builder,
            builder_version=builder_version,
            compute_capability=capability,
            precision=precision,
            input_shape=(3, side, side),
            output_shape=output_shape,
            max_batch=max_batch,
            checkpoint_sha256=checkpoint.weights.vision_sha256(),
            exporter=_exporter_sha256(),
        )

    @property
    def is_for_rtx(self) -> bool:
        """Whether TensorRT for RTX builds, whose plans only its own runtime loads."""
        return self._tensorrt is not None and self._tensorrt.__name__ == RTX

    def make(self, directory: Path, previous: Path) -> Report | None:
        """Fill `directory` with the encoder, its metadata and its report.

        Args:
            directory: the new repository's `vision_encoder/1`.
            previous: the same of the repository it will replace; need not exist.

        Returns:
            The comparison with PyTorch; None where the previous encoder still fits.

        Raises:
            ExportError: the checkpoint is incomplete, the build fails, or the features are too
                far from PyTorch's.
        """
        if artifact.is_current(previous, self.metadata) and (previous / REPORT).is_file():
            for name in [*artifact.sealed_files(previous), artifact.METADATA, REPORT]:
                _link_or_copy(previous / name, directory / name)
            print("  the vision encoder is up to date")
            return None
        with step("loading the vision encoder"):
            encoder = load_vision_encoder(self._checkpoint.config, self._checkpoint.weights)
        report = self._build(encoder, directory)
        (directory / REPORT).write_text(report.to_json())
        report.require()
        artifact.seal(directory, self.metadata)
        return report

    def _build(self, encoder: VisionEncoder, directory: Path) -> Report:
        if self._tensorrt is not None:
            return self._build_plan(self._tensorrt, encoder, directory)
        graph = directory / self.metadata.file_name
        self._export(encoder, graph)
        return self._compare(encoder, {"ONNX Runtime": onnx_encoder(graph)}, "on the CPU")

    def _build_plan(self, tensorrt: ModuleType, encoder: VisionEncoder, directory: Path) -> Report:
        capability = self.metadata.compute_capability
        assert capability is not None
        mixed = to_mixed_precision(encoder) if self.metadata.precision == "fp16" else None
        plan = directory / self.metadata.file_name
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            graph = Path(scratch) / "model.onnx"
            self._export(mixed or encoder, graph)
            name = f"{tensorrt.__name__} {tensorrt.__version__}"
            with step(f"building the engine for {capability} by {name}"):
                build_engine(
                    tensorrt,
                    graph,
                    plan,
                    capability=capability,
                    input_shape=self.metadata.input_shape,
                    max_batch=self.metadata.max_batch,
                )
            if torch.cuda.is_available() and local_compute_capability() == capability:
                engine = {"engine": engine_encoder(tensorrt, plan)}
                return self._compare(encoder, engine, f"on {torch.cuda.get_device_name()}")
            exported = {"ONNX Runtime": onnx_encoder(graph)}
            if mixed is not None:  # ONNX Runtime's CPU kernels leave float16's rounding out
                exported["float16 rounded"] = _torch_encoder(mixed)
            return self._compare(
                encoder,
                exported,
                "the engine's graph, on the CPU; the engine itself has not run, for want of a GPU "
                f"of compute capability {capability}",
            )

    def _export(self, encoder: VisionEncoder, path: Path) -> None:
        with step(f"exporting it to ONNX ({self.metadata.precision})"):
            export_onnx(encoder, self.metadata.input_shape[1], path)

    def _compare(self, encoder: VisionEncoder, exported: Mapping[str, Encode], note: str) -> Report:
        with step("comparing its features with PyTorch's"):
            return compare(
                _torch_encoder(encoder),
                exported,
                self._checkpoint.image_processor,
                max_batch=self.metadata.max_batch,
                precision=self.metadata.precision,
                note=note,
            )


def _torch_encoder(encoder: VisionEncoder) -> Encode:
    def encode(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            features: torch.Tensor = encoder(torch.from_numpy(pixels))
        return features.numpy()

    return encode


def image_side(image_processor: Any) -> int:
    """Pixels a side of the tiles that an image processor makes; tried out, not read."""
    picture = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels = image_processor(picture, return_tensors="np")["pixel_values"]
    return int(np.shape(pixels)[-1])


def _exporter_sha256() -> str:
    digest = hashlib.sha256()
    sources = [Path(vision_tower.__file__)]
    sources += [Path(__file__).parent / name for name in _GRAPH_SOURCES]
    for source in sources:
        digest.update(source.read_bytes())
    for package in _GRAPH_PACKAGES:
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
