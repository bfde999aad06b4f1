"""The vision encoder for the GPU at hand: built by TensorRT once, and kept."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_export.artifact import read_metadata
from llava_export.errors import ExportError
from llava_sagemaker.container.errors import ContainerError

Run = Callable[[Sequence[str]], int]
"""Runs a command; gives its exit status."""
CACHE = Path(".cache") / "llava-triton"
"""In the home directory: what was built, a folder for each model. (Not in the model's own: that may
be read-only, and Triton takes every folder in it for a model.)"""


def gpu_capability() -> str | None:
    """The first GPU's compute capability, such as "8.6"; None without one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    from llava_export.tensorrt_engine import local_compute_capability  # imports PyTorch: seconds

    return local_compute_capability()


def installed_tensorrt() -> str | None:
    """The version of TensorRT itself; None without it. (Triton loads no plans of its sisters.)"""
    from llava_export.tensorrt_engine import find_tensorrt

    try:
        tensorrt = find_tensorrt()
    except ExportError:
        return None
    return str(tensorrt.__version__) if tensorrt.__name__ == "tensorrt" else None


def repository_to_serve(
    model: Path,
    capability: Callable[[], str | None] = gpu_capability,
    tensorrt: Callable[[], str | None] = installed_tensorrt,
    run: Run = subprocess.call,
) -> Path:
    """The model repository that fits this machine.

    Without a GPU, `model` itself. With one, a repository whose encoder is a TensorRT plan for this
    GPU and this TensorRT: `model`, if its plan is, else one built from the checkpoint in `model`,
    and kept. Where the build fails, `model` itself if it can be served without TensorRT.

    Args:
        model: an exported model repository; may be read-only.
        capability: of this machine's GPU, None without one.
        tensorrt: the version installed, None without it.
        run: runs the export.

    Raises:
        ContainerError: there is no model, or no encoder that runs here.
    """
    config = model / "vision_encoder" / "config.pbtxt"
    if not config.is_file():
        raise ContainerError(
            f"{model} is no model repository of this project: it has no vision_encoder/config.pbtxt"
            "; export one by `make export MODEL=...` and give its S3 prefix as the model's data"
        )
    needs_tensorrt = "tensorrt_plan" in config.read_text()
    gpu = capability()
    if gpu is None:
        if needs_tensorrt:
            raise ContainerError(
                f"{model} was exported for a GPU and this machine has none; export it with "
                "`--target cpu`, or choose an instance type with an NVIDIA GPU"
            )
        return model
    version = tensorrt()
    if _is_built_for(model, gpu, version):
        return model
    name = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:16]
    kept = Path.home() / CACHE / name
    command = [sys.executable, "-m", "llava_export", "--target", "gpu", "--output", str(kept)]
    command += ["--model", str(model / "language_model" / "1" / "checkpoint")]
    command += ["--settings", str(model / "settings.json")]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another instance on this machine may be building it
        if not _is_built_for(kept, gpu, version):
            shutil.rmtree(kept, ignore_errors=True)
            print(f"building a TensorRT engine for compute capability {gpu}: minutes", flush=True)
        # Where the kept one was made of this very model, the export sees that and does nothing.
        built = run(command) == 0
    if built and _is_built_for(kept, gpu, version):
        return kept
    if needs_tensorrt:
        raise ContainerError("the TensorRT engine could not be built; the lines above say why")
    print("warning: serving without TensorRT: the encoder runs in torch on the GPU", flush=True)
    return model


def _is_built_for(repository: Path, capability: str, version: str | None) -> bool:
    """Whether the repository's encoder is a plan that Triton can load here."""
    encoder = repository / "vision_encoder" / "1"
    built_for = read_metadata(encoder).get("built_for", {})
    wanted = {
        "builder": "tensorrt",
        "builder_version": version,
        "compute_capability": capability,
    }
    return (encoder / "model.plan").is_file() and wanted.items() <= built_for.items()
