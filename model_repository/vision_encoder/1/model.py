"""Pixel values -> image features, on servers without Triton's TensorRT backend."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from llava_triton import protocol
from llava_triton.settings import Settings
from llava_triton.vision_encoding import vision_encoding


class TritonPythonModel:
    """`vision_encoder`: runs all requests of a call as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Choose what runs it on this machine, and say so in the log."""
        repository = Path(args["model_repository"]).parent
        self._encode = vision_encoding(repository, Settings.of_repository(repository))
        pb_utils.Logger.log_info(f"the vision encoder is run by {self._encode.name}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode the pictures of every request: float32 [N, 3, H, W] -> float32 [N, T, D]."""
        try:
            pixels = [
                pb_utils.get_input_tensor_by_name(request, protocol.PIXEL_VALUES).as_numpy()
                for request in requests
            ]
            batch = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            features = self._encode(batch)
            ends = accumulate(len(each) for each in pixels)
            return [
                _response(features[end - len(each) : end])
                for each, end in zip(pixels, ends, strict=True)
            ]
        except Exception as failure:  # an answer for every request, whatever happens
            error = pb_utils.TritonError(
                f"INTERNAL: the vision encoder failed: {failure}", pb_utils.TritonError.INTERNAL
            )
            return [pb_utils.InferenceResponse(error=error) for _ in requests]


def _response(features: Any) -> Any:
    # By DLPack only what may lie on a GPU: Triton's process dies of NumPy's.
    on_host = isinstance(features, np.ndarray)
    make = pb_utils.Tensor if on_host else pb_utils.Tensor.from_dlpack
    tensor = make(protocol.IMAGE_FEATURES, features)
    return pb_utils.InferenceResponse([tensor])
