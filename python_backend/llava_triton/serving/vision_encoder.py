"""Pixel values -> image features, on servers without Triton's TensorRT backend."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.models import ENCODED, PIXEL_VALUES
from llava_triton.contract.settings import Settings
from llava_triton.pictures.tower import vision_encoding
from llava_triton.serving.backend import Backend


class VisionEncoder:
    """`vision_encoder`: runs all requests of a call as one batch."""

    def __init__(self, pb_utils: Any) -> None:
        self._backend = Backend(pb_utils)

    def initialize(self, args: dict[str, str]) -> None:
        """Choose what runs it on this machine, and say so in the log."""
        repository = Path(args["model_repository"]).parent
        self._encode = vision_encoding(repository, Settings.of_repository(repository))
        logger = self._backend.pb_utils.Logger
        logger.log_info(f"the vision encoder is run by {self._encode.name}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode the pictures of every request: float32 [N, 3, H, W] -> float32 [N, T, D]."""
        try:
            pixels = [self._pixels(request) for request in requests]
            batch = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            features = self._encode(batch)
            ends = accumulate(len(each) for each in pixels)
            return [
                self._response(features[end - len(each) : end])
                for each, end in zip(pixels, ends, strict=True)
            ]
        except Exception as failure:  # an answer for every request, whatever happens
            error = SessionError(ErrorCode.INTERNAL, f"the vision encoder failed: {failure}")
            return [self._backend.refusal(error) for _ in requests]

    def _pixels(self, request: Any) -> np.ndarray:
        pixels = self._backend.array(request, PIXEL_VALUES)
        assert pixels is not None
        return pixels

    def _response(self, features: Any) -> Any:
        # By DLPack only what may lie on a GPU: Triton's process dies of NumPy's.
        on_host = isinstance(features, np.ndarray)
        kind = self._backend.pb_utils.Tensor
        tensor = (kind if on_host else kind.from_dlpack)(ENCODED.name, features)
        return self._backend.pb_utils.InferenceResponse([tensor])
