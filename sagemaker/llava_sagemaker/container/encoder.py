"""The vision encoder for the GPU at hand: built by TensorRT once, and kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_export.tensorrt_engine import local_compute_capability
from llava_sagemaker.container.errors import ContainerError

Run = Callable[[Sequence[str]], int]
"""Runs a command; gives its exit status."""
KEPT = "tensorrt"
"""The folder, in the model's own or in that for temporary files, with what was built."""


def repository_to_serve(
    model: Path,
    capability: Callable[[], str | None] = local_compute_capability,
    run: Run = subprocess.call,
) -> Path:
    """The model repository that fits this machine.

    Without a GPU: `model` itself. With one: a repository whose encoder is a TensorRT plan for this
    GPU and this TensorRT, built from the checkpoint in `model` where there is none that fits. Where
    the build fails, `model` itself if it can be served without TensorRT.

    Args:
        model: an exported model repository; may be read-only.
        capability: of this machine's GPU, None without one.
        run: runs the export.

    Raises:
        ContainerError: there is no model, or no encoder that runs here.
    """
    if not any(model.glob("*/config.pbtxt")):
        raise ContainerError(
            f"{model} is no model repository: no folder in it holds a config.pbtxt; export one by "
            "`make export MODEL=...` and give that folder's S3 prefix as the model's data"
        )
    needs_tensorrt = "tensorrt_plan" in (model / "vision_encoder" / "config.pbtxt").read_text()
    if capability() is None:
        if needs_tensorrt:
            raise ContainerError(
                f"{model} was exported for a GPU and this machine has none; export it with "
                "`--target cpu`, or choose an instance type with an NVIDIA GPU"
            )
        return model
    kept = _folder_to_keep(model) / KEPT
    command = [sys.executable, "-m", "llava_export", "--target", "gpu", "--output", str(kept)]
    command += ["--model", str(model / "language_model" / "1" / "checkpoint")]
    command += ["--settings", str(model / "settings.json")]
    print("a TensorRT engine for this GPU: building it unless the last one fits", flush=True)
    if run(command) == 0:
        return kept
    if needs_tensorrt:
        raise ContainerError("the TensorRT engine could not be built; the lines above say why")
    print("warning: serving without TensorRT: the encoder runs in ONNX Runtime", flush=True)
    return model


def _folder_to_keep(model: Path) -> Path:
    return model if os.access(model, os.W_OK) else Path(tempfile.gettempdir())
