"""Encoded pictures -> image features, on worker threads: sessions do not wait for each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor

from llava_triton import protocol
from llava_triton.bytes_tensors import limit_elements
from llava_triton.device import default_device
from llava_triton.encoded_images import EncodedImages
from llava_triton.errors import ErrorCode, SessionError, invalid, unavailable
from llava_triton.images import PixelValues, iterate_images
from llava_triton.in_order import InOrder
from llava_triton.metrics import Publisher, image_encoder_metrics
from llava_triton.settings import Settings

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

MAX_WORKERS = 4
"""Each decodes one picture at a time, of up to `Settings.max_image_pixels`."""


class TritonPythonModel:
    """`image_encoder`: decodes and normalizes here, then calls `vision_encoder`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint's image processor."""
        repository = Path(args["model_repository"])
        processor = repository / args["model_version"] / "processor"
        self._settings = Settings.of_repository(repository.parent)
        self._pixel_values = PixelValues(processor)
        self._encoded = EncodedImages(
            self._settings.encoded_images_bytes,
            fingerprint=b"".join(path.read_bytes() for path in sorted(processor.iterdir())),
        )
        # Features stay where they are computed; the language model's are there too.
        on_gpu = default_device().type == "cuda"
        self._features_memory = pb_utils.PreferredMemory(
            pb_utils.TRITONSERVER_MEMORY_GPU if on_gpu else pb_utils.TRITONSERVER_MEMORY_CPU
        )
        limit_elements(pb_utils, self._settings.max_images_per_turn + 1)
        self._jobs = InOrder(min(MAX_WORKERS, os.cpu_count() or 1), self._settings.max_queued_turns)
        self._metrics = Publisher(pb_utils, lambda: image_encoder_metrics(self._encoded))

    def execute(self, requests: list[Any]) -> None:
        """Answer requests without a picture at once, the others from a worker."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                session, image = request.correlation_id(), _images(request)
            except Exception as error:  # such as an ID that is no text
                _send_error(sender, invalid(f"the request cannot be read: {error}"))
                continue
            self._start(session, image, sender)

    def finalize(self) -> None:
        """Let running pictures finish."""
        self._jobs.shutdown()
        self._metrics.stop()

    def _start(self, session: int | str, image: np.ndarray | None, sender: Any) -> None:
        try:
            items = protocol.image_items(image, self._settings)
        except SessionError as error:
            _send_error(sender, error)
            return
        # A turn without a picture must not overtake an earlier one of its session with a picture.
        # 0 is no session: such requests have nothing to do with one another.
        lane = session or object()
        if not items:
            nothing = pb_utils.Tensor(protocol.IMAGE_FEATURES, protocol.NO_FEATURES)
            self._jobs.submit(lane, lambda: _send(sender, nothing), quick=True)
        elif not self._jobs.submit(lane, lambda: self._answer(items, sender)):
            limit = self._settings.max_queued_turns
            _send_error(sender, unavailable(f"{limit} pictures are waiting; try again later"))

    def _answer(self, items: list[bytes], sender: Any) -> None:
        try:
            features = self._encoded.features(items, self._encode)
            # The tensor, not its capsule: Triton then waits for the stream that is filling it.
            _send(sender, pb_utils.Tensor.from_dlpack(protocol.IMAGE_FEATURES, features))
        except SessionError as error:
            _send_error(sender, self._numbered(items, error))
        except Exception as error:
            pb_utils.Logger.log_error(f"a picture could not be encoded: {error!r}")
            sentence = f"the picture could not be encoded: {error}"
            _send_error(sender, SessionError(ErrorCode.INTERNAL, sentence))

    def _numbered(self, items: list[bytes], error: SessionError) -> SessionError:
        """The error with the picture's number in its turn: only new pictures are decoded, so the
        one that failed may have been counted among fewer."""
        try:
            for _ in iterate_images(items, self._settings):
                pass
        except SessionError as numbered:
            return numbered
        except Exception:  # at full size, which memory may not suffice for
            pass
        return error

    def _encode(self, items: Sequence[bytes]) -> Tensor:
        pixels = self._pixel_values.of_encoded(list(items), self._settings)
        response = pb_utils.InferenceRequest(
            model_name="vision_encoder",
            requested_output_names=[protocol.IMAGE_FEATURES],
            inputs=[pb_utils.Tensor(protocol.PIXEL_VALUES, np.ascontiguousarray(pixels))],
            preferred_memory=self._features_memory,
        ).exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        features = pb_utils.get_output_tensor_by_name(response, protocol.IMAGE_FEATURES)
        return torch.utils.dlpack.from_dlpack(features.to_dlpack())


def _images(request: Any) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, protocol.IMAGE)
    return None if tensor is None else tensor.as_numpy()


def _send(sender: Any, features: Any) -> None:
    # Without a picture an empty tensor, not no tensor: an omitted output would reset the sequence
    # flags that Triton hands to the ensemble's next step.
    sender.send(pb_utils.InferenceResponse([features]), flags=FINAL)


def _send_error(sender: Any, error: SessionError) -> None:
    code = getattr(pb_utils.TritonError, error.code.name)
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
    sender.send(response, flags=FINAL)
