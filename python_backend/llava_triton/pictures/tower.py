"""Runs the vision encoder where Triton has no TensorRT: by torch on a GPU, else by ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from llava_triton.contract.models import PIXEL_VALUES
from llava_triton.contract.settings import Settings


class VisionEncoding(Protocol):
    """A vision encoder that runs in this process."""

    name: str
    """What runs it and where, for people."""

    def __call__(self, pixels: np.ndarray) -> Any:
        """Encode pictures.

        Args:
            pixels: float32 [N, 3, H, W].

        Returns:
            Features float32 [N, T, D], complete: an array of NumPy's, or a tensor of torch's on the
            device that computed it.
        """


def vision_encoding(repository: Path, settings: Settings) -> VisionEncoding:
    """The fastest encoder for this machine.

    Args:
        repository: the exported model repository.
        settings: its settings.
    """
    if has_driver():
        # torch and transformers take seconds and 300 MiB, for nothing where there is no GPU.
        from llava_triton.device import compute_dtype, default_device
        from llava_triton.pictures.torch_tower import TorchEncoding

        device = default_device()
        if device.type == "cuda":
            return TorchEncoding(
                repository / "language_model" / "1" / "checkpoint",
                device,
                compute_dtype(settings.dtype, device),
                settings.vision_max_batch,
            )
    return OnnxEncoding(repository / "vision_encoder" / "1" / "model.onnx")


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed; torch knows whether there is a GPU behind it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class OnnxEncoding:
    """The exported graph on the CPU.

    Args:
        graph: `model.onnx`.
    """

    def __init__(self, graph: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # Idle threads sleep: the language model needs the cores as soon as the features are there.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self.name = f"ONNX Runtime {onnxruntime.__version__} on the CPU"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """See `VisionEncoding`."""
        features: np.ndarray = self._session.run(None, {PIXEL_VALUES.name: pixels})[0]
        return features
