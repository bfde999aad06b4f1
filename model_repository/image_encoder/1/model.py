"""Encoded pictures -> image features, on worker threads: they do not wait for each other."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from llava_triton import protocol
from llava_triton.errors import ErrorCode, SessionError
from llava_triton.images import PixelValues
from llava_triton.settings import Settings

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

MAX_WORKERS = 4
"""Each decodes one picture at a time, of up to `Settings.max_image_pixels`."""


class TritonPythonModel:
    """`image_encoder`: decodes and normalizes here, then calls `vision_encoder`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint's image processor."""
        repository = Path(args["model_repository"])
        self._settings = Settings.of_repository(repository.parent)
        self._pixel_values = PixelValues(repository / args["model_version"] / "processor")
        self._workers = ThreadPoolExecutor(max_workers=min(MAX_WORKERS, os.cpu_count() or 1))

    def execute(self, requests: list[Any]) -> None:
        """Answer requests without a picture at once, the others from a worker."""
        for request in requests:
            tensor = pb_utils.get_input_tensor_by_name(request, protocol.IMAGE)
            sender = request.get_response_sender()
            try:
                items = protocol.image_items(
                    None if tensor is None else tensor.as_numpy(), self._settings
                )
            except SessionError as error:
                _send_error(sender, error)
                continue
            if items:
                self._workers.submit(self._encode, items, sender)
            else:
                # An empty tensor, not no tensor: an omitted output would reset the sequence flags
                # that Triton hands to the ensemble's next step.
                _send(sender, pb_utils.Tensor(protocol.IMAGE_FEATURES, protocol.NO_FEATURES))

    def finalize(self) -> None:
        """Let running pictures finish."""
        self._workers.shutdown()

    def _encode(self, items: list[bytes], sender: Any) -> None:
        try:
            pixels = self._pixel_values.of_encoded(items, self._settings)
            response = pb_utils.InferenceRequest(
                model_name="vision_encoder",
                requested_output_names=[protocol.IMAGE_FEATURES],
                inputs=[pb_utils.Tensor(protocol.PIXEL_VALUES, np.ascontiguousarray(pixels))],
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
            ).exec()
            if response.has_error():
                raise RuntimeError(response.error().message())
            features = pb_utils.get_output_tensor_by_name(response, protocol.IMAGE_FEATURES)
            _send(sender, features)
        except SessionError as error:
            _send_error(sender, error)
        except Exception as error:
            pb_utils.Logger.log_error(f"a picture could not be encoded: {error!r}")
            sentence = f"the picture could not be encoded: {error}"
            _send_error(sender, SessionError(ErrorCode.INTERNAL, sentence))


def _send(sender: Any, tensor: Any) -> None:
    sender.send(pb_utils.InferenceResponse([tensor]), flags=FINAL)


def _send_error(sender: Any, error: SessionError) -> None:
    code = getattr(pb_utils.TritonError, error.code.name)
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
    sender.send(response, flags=FINAL)
