"""Encoded pictures and videos -> image features, for all sessions at once."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava_triton.contract import protocol
from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import (
    ENCODED,
    ENCODED_PICTURES,
    IMAGE,
    IMAGE_FEATURES,
    IMAGE_LENGTHS,
    PIXEL_VALUES,
    VIDEO,
)
from llava_triton.contract.settings import Settings
from llava_triton.device import default_device, policy_of
from llava_triton.pictures.assembly import PictureAssembly
from llava_triton.pictures.encoding import MOST_BEGUN, PictureEncoding
from llava_triton.pictures.feature_cache import EncodedImages
from llava_triton.pictures.feature_rows import flattened
from llava_triton.pictures.videos import turn_items
from llava_triton.serving.backend import Backend
from llava_triton.serving.bounded_backlog import BoundedBacklog
from llava_triton.serving.bytes_tensors import limit_elements
from llava_triton.serving.metrics import Publisher, image_encoder_metrics

if TYPE_CHECKING:
    from llava_triton.serving.picture_journal import PictureJournal

MAX_WORKERS = 4
"""Each decodes one picture at a time, of up to `Settings.max_image_pixels`."""
NOTHING = np.zeros(0, dtype=np.uint8)


class ImageEncoder:
    """`image_encoder`: decodes and normalizes here, then calls `vision_encoder`.

    Of `PictureEncoding`'s threads one makes every call to vision_encoder: the only BLS calls of
    this process that carry tensors. Another asks language_model for room, and `BoundedBacklog`'s
    reaches the models that come next in the ensembles; those calls carry none.
    """

    def __init__(self, pb_utils: Any) -> None:
        self._backend = Backend(pb_utils)

    def initialize(self, args: dict[str, str]) -> None:
        """Load what the checkpoint does with pictures around its vision tower."""
        pb_utils = self._backend.pb_utils
        repository = Path(args["model_repository"])
        processor = repository / args["model_version"] / "processor"
        self._settings = Settings.of_repository(repository.parent)
        # Threads that handle large pictures give way to turns without one so soon (else in 5 ms).
        sys.setswitchinterval(0.0005)
        checkpoint = repository.parent / "language_model" / "1" / "checkpoint"
        assembly = self._assembly = PictureAssembly(checkpoint, processor, self._settings)
        # Features stay where they are computed; the language model's are there too.
        on_gpu = not policy_of(default_device()).is_host
        self._features_memory = pb_utils.PreferredMemory(
            pb_utils.TRITONSERVER_MEMORY_GPU if on_gpu else pb_utils.TRITONSERVER_MEMORY_CPU
        )
        limit_elements(pb_utils, self._settings.max_images_per_turn + 1)
        self._pictures = PictureEncoding(
            assembly.look,
            self._encode,
            self._ask_for_room,
            EncodedImages(
                self._settings.encoded_images_bytes,
                fingerprint=b"".join(path.read_bytes() for path in sorted(processor.iterdir()))
                + repr(self._settings.video_frames).encode(),
            ),
            workers=max(2, min(MAX_WORKERS, len(os.sched_getaffinity(0)))),
            max_batch=self._settings.vision_max_batch,
            most_tokens=assembly.context_length,
            most_begun=min(
                MOST_BEGUN,
                max(1, self._settings.max_queued_features_bytes // assembly.most_bytes),
            ),
            most_waiting=self._settings.max_queued_turns,
        )
        self._backlog = BoundedBacklog(self._reach_next_models)
        self._journal = _picture_journal(self._settings, assembly)
        self._metrics = Publisher(
            pb_utils, lambda: image_encoder_metrics(self._pictures, self._journal)
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests without a picture at once, the others when their features are there."""
        replies = [Reply(request, self._backend.final) for request in requests]
        for request, reply in zip(requests, replies, strict=True):
            try:
                self._submit(request, reply)
            except SessionError as error:
                reply.send(self._response(error))
            except Exception as error:  # such as an ID that is no text
                reply.send(self._response(invalid(f"the request cannot be read: {error}")))
        return [reply.returned() for reply in replies]

    def finalize(self) -> None:
        """Let running pictures finish."""
        self._backlog.stop()
        self._pictures.shutdown()
        self._assembly.close()
        self._metrics.stop()
        if self._journal is not None:
            self._journal.close()

    def _submit(self, request: Any, reply: Reply) -> None:
        session = request.correlation_id()
        images, videos = (
            protocol.image_items(self._backend.array(request, spec), self._settings, spec)
            for spec in (IMAGE, VIDEO)
        )
        items = turn_items(images, videos, self._settings)
        parameters = self._backend.parameters(request)
        tenant = protocol.parse_tenant(parameters)
        answer = partial(self._answer, reply)
        ends = request.flags() & self._backend.end
        if self._journal is not None and items and session and not ends:
            answer = partial(self._answer_and_keep, reply, session, tenant, items)
        self._pictures.submit(
            # A turn without a picture must not overtake an earlier one of its session with a
            # picture. 0 is no session: such requests have nothing to do with one another.
            session or object(),
            items,
            answer,
            tenant=tenant,
            opening=session if session and request.flags() & self._backend.start else None,
        )

    def _answer(self, reply: Reply, outcome: Sequence[Tensor] | SessionError) -> None:
        if not isinstance(outcome, SessionError):  # an error goes no further
            self._backlog.pass_one()
        reply.send(self._response(outcome))

    def _answer_and_keep(
        self,
        reply: Reply,
        session: int | str,
        tenant: str,
        items: Sequence[bytes],
        outcome: Sequence[Tensor] | SessionError,
    ) -> None:
        self._answer(reply, outcome)
        if self._journal is not None and not isinstance(outcome, SessionError):
            self._journal.keep(session, tenant, items, outcome)

    def _encode(self, pixels: np.ndarray) -> Tensor:
        pb_utils = self._backend.pb_utils
        response = pb_utils.InferenceRequest(
            model_name="vision_encoder",
            requested_output_names=[ENCODED.name],
            inputs=[pb_utils.Tensor(PIXEL_VALUES.name, np.ascontiguousarray(pixels))],
            preferred_memory=self._features_memory,
        ).exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        features = pb_utils.get_output_tensor_by_name(response, ENCODED.name)
        return torch.utils.dlpack.from_dlpack(features.to_dlpack())

    def _ask_for_room(self, session: Any) -> None:
        if isinstance(session, int) and session.bit_length() > 63:
            return  # no request parameter holds it; language_model will tell in the end
        self._tell_language_model({protocol.ROOM: session})

    def _reach_next_models(self) -> None:
        self._tell_language_model({protocol.MARK: True})
        self._backend.tell("answer_collector", {protocol.MARK: True}, decoupled=False)

    def _tell_language_model(self, parameters: dict[str, Any]) -> None:
        """A sequence of its own, of one request: Triton delivers it beside all others.

        Raises:
            SessionError: what language_model answers.
        """
        self._backend.tell(
            "language_model",
            parameters,
            correlation_id=uuid.uuid4().hex,
            flags=self._backend.start | self._backend.end,
        )

    def _response(self, outcome: Sequence[Tensor] | SessionError) -> Any:
        pb_utils = self._backend.pb_utils
        if isinstance(outcome, SessionError):
            return self._backend.refusal(outcome)
        if not outcome:
            # Empty tensors, not none: an omitted output would reset the sequence flags that Triton
            # hands to the ensemble's next step.
            return self._backend.response({spec.name: NOTHING for spec in ENCODED_PICTURES})
        rows, lengths = flattened(outcome)
        # The tensor, not its capsule: Triton then waits for the stream that is filling it.
        features = pb_utils.Tensor.from_dlpack(IMAGE_FEATURES.name, rows)
        return pb_utils.InferenceResponse([features, pb_utils.Tensor(IMAGE_LENGTHS.name, lengths)])


class Reply:
    """The one response to a request: returned by `execute` if it is there by then, which costs no
    message of its own, else sent later.

    Args:
        request: Triton's.
        final: the flag of a last response.
    """

    def __init__(self, request: Any, final: int) -> None:
        self._sender = request.get_response_sender()
        self._final = final
        self._lock = threading.Lock()
        self._response: Any = None
        self._is_late = False

    def send(self, response: Any) -> None:
        """Answer; called once, on any thread."""
        with self._lock:
            if not self._is_late:
                self._response = response
                return
        self._sender.send(response, flags=self._final)

    def returned(self) -> Any:
        """What `execute` returns for the request: the response, or None where it comes later."""
        with self._lock:
            self._is_late = True
            return self._response


def _picture_journal(settings: Settings, assembly: PictureAssembly) -> PictureJournal | None:
    """What keeps pictures; None where the server keeps no journal."""
    if not settings.journal:
        return None
    from llava_triton.serving import picture_journal  # obstore need not be installed for others

    return picture_journal.PictureJournal(settings, assembly.as_shown)
