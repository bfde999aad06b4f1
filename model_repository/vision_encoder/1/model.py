"""Pixel values -> image features by ONNX Runtime, for servers without TensorRT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

from llava_triton import protocol


class TritonPythonModel:
    """`vision_encoder`: runs all requests of a call as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph, on a GPU if the installed ONNX Runtime has CUDA."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # Idle threads sleep: the language model needs the cores as soon as the features are there.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        available = onnxruntime.get_available_providers()
        self._session = onnxruntime.InferenceSession(
            Path(args["model_repository"]) / args["model_version"] / "model.onnx",
            options,
            providers=[name for name in wanted if name in available],
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode the pictures of every request: float32 [N, 3, H, W] -> float32 [N, T, D]."""
        try:
            pixels = [
                pb_utils.get_input_tensor_by_name(request, protocol.PIXEL_VALUES).as_numpy()
                for request in requests
            ]
            batch = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            features = self._session.run(None, {protocol.PIXEL_VALUES: batch})[0]
        except Exception as failure:  # an answer for every request, whatever happens
            error = pb_utils.TritonError(
                f"INTERNAL: the vision encoder failed: {failure}", pb_utils.TritonError.INTERNAL
            )
            return [pb_utils.InferenceResponse(error=error) for _ in requests]
        ends = np.cumsum([len(each) for each in pixels])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(protocol.IMAGE_FEATURES, part)])
            for part in np.split(features, ends)
        ]
