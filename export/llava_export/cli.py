"""`python -m llava_export`: checkpoint -> ONNX -> TensorRT -> a model repository Triton serves."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from llava_export.errors import ExportError
from llava_export.repository import ExportJob, export
from llava_triton.contract.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit code: 0 when the repository is filled, 2 for a user's mistake.
    """
    began = time.perf_counter()
    options = vars(_parser().parse_args(arguments))
    try:
        job = make_job(**options | {"settings": read_settings(options["settings"])})
        done = export(job)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    print(f"  {job.output} is {f'ready after {seconds:.1f} s' if done else 'up to date'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_export", description="Fill a Triton model repository from a LLaVA."
    )
    parser.add_argument(
        "--model", required=True, help="checkpoint: a directory, a hub name or NAME@REVISION"
    )
    parser.add_argument("--output", required=True, type=Path, help="model repository to fill")
    parser.add_argument(
        "--target",
        choices=("cpu", "gpu"),
        default="cpu",
        help="vision encoder: cpu = ONNX Runtime in the Python backend; gpu = a TensorRT plan, for "
        "a Triton with its TensorRT backend (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp16", "fp32"),
        help="of the vision encoder (default: fp32 on the CPU, fp16 with its sensitive parts in "
        "fp32 on the GPU)",
    )
    parser.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="GPU to build the plan for (default: this machine's)",
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the checkpoint instead of linking to it"
    )
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="JSON file with the limits that are to differ from the defaults",
    )
    return parser


def make_job(
    model: str,
    output: Path,
    settings: Settings,
    *,
    target: str = "cpu",
    precision: str | None = None,
    compute_capability: str | None = None,
    copy: bool = False,
) -> ExportJob:
    """The job that the command's options ask for; see `--help`.

    Raises:
        ExportError: they do not fit together.
    """
    on_gpu = target == "gpu"
    if not on_gpu and precision == "fp16":
        raise ExportError("--precision fp16 is for --target gpu; a CPU computes in fp32")
    if not on_gpu and compute_capability:
        raise ExportError("--compute-capability is for --target gpu")
    return ExportJob(
        model=model,
        output=output,
        target=target,
        precision=precision or ("fp16" if on_gpu else "fp32"),
        compute_capability=compute_capability,
        copy=copy,
        settings=settings,
    )


def read_settings(path: Path | None) -> Settings:
    """The settings in a JSON file; the defaults without one.

    Raises:
        ExportError: it does not hold settings.
    """
    if path is None:
        return Settings()
    try:
        return Settings.from_json(path.read_text())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} does not hold settings: {error}") from error
