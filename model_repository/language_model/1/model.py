"""Triton's side of the session engine: sequences in, streams of text out."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from llava_triton import protocol
from llava_triton.checkpoint import load_checkpoint
from llava_triton.delta import Delta
from llava_triton.device import compute_dtype, default_device, work_beside
from llava_triton.engine import Engine, TurnRequest
from llava_triton.engine.model_runner import ModelRunner
from llava_triton.errors import ErrorCode, SessionError, as_session_error, invalid
from llava_triton.metrics import Publisher, engine_metrics
from llava_triton.responses import ResponseThread
from llava_triton.settings import Settings

log = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
START = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
END = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
WATCH_SECONDS = 0.1
"""How often a streaming turn asks disconnect_watch whether its client is still there."""


class TritonPythonModel:
    """`language_model`: one instance, because it owns every session."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint and start the engine."""
        repository = Path(args["model_repository"])
        settings = Settings.of_repository(repository.parent)
        device = default_device()
        checkpoint = load_checkpoint(
            repository / args["model_version"] / "checkpoint",
            dtype=compute_dtype(settings.dtype, device),
            device=device,
        )
        self._settings = settings
        self._device = device
        self._engine = Engine(ModelRunner(checkpoint, settings), checkpoint.tokenizer, settings)
        self._responses = ResponseThread()
        self._stopping = False
        self._secret = uuid.uuid4().hex
        self._calls = ThreadPoolExecutor(1, "releases")
        self._metrics = Publisher(pb_utils, lambda: engine_metrics(self._engine.statistics()))

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the engine; the answers follow through their response senders."""
        for request in requests:
            parameters = json.loads(request.parameters() or "{}")
            if self._is_between_models(request, parameters):
                request.get_response_sender().send(flags=FINAL)
                continue
            whole = protocol.WHOLE_ANSWER in parameters
            opens = request.flags() & (START | END) == START
            refused = partial(self._release, request.correlation_id()) if opens else None
            responder = Responder(
                request.get_response_sender(), self._responses, whole=whole, refused=refused
            )
            try:
                with work_beside(self._device):  # it copies the features
                    turn = self._turn_request(request, parameters)
            except Exception as error:
                # Raising would fail every request of this call and is said to leak shared memory.
                self._refuse(request, responder, as_session_error(error))
                continue
            responder.turn_id = self._engine.submit(turn, responder)

    def finalize(self) -> None:
        """Free every session."""
        self._stopping = True
        self._metrics.stop()
        self._engine.shutdown()
        self._calls.shutdown()
        self._responses.stop()

    def _is_between_models(self, request: Any, parameters: dict[str, Any]) -> bool:
        """Whether a request comes from disconnect_watch or from here, and is done with."""
        turn_id = parameters.get(protocol.CANCEL_TURN)
        alone = request.flags() & (START | END) == START | END
        if alone and turn_id and turn_id == request.correlation_id():
            self._engine.cancel(turn_id)
            return True
        return bool(parameters.get(protocol.RELEASE) == self._secret)

    def _release(self, session_id: int | str, tell: Callable[[], None]) -> None:
        """A session was not opened: before its client hears of it, Triton lets its sequence go.

        It would keep it until its idle limit, and has places for so many only.
        """
        if self._stopping:  # Triton lets everything go
            tell()
        else:
            self._calls.submit(self._release_now, session_id, tell)

    def _release_now(self, session_id: int | str, tell: Callable[[], None]) -> None:
        try:
            if not self._engine.knows(session_id):  # one of the same ID may have been open before
                call = pb_utils.InferenceRequest(
                    model_name="language_model",
                    requested_output_names=[],
                    inputs=[],
                    correlation_id=session_id,
                    flags=END,
                    parameters={protocol.RELEASE: self._secret},
                )
                for response in call.exec(decoupled=True):
                    if response.has_error():
                        log.warning("sequence %r was not let go: %s", session_id, response.error())
        except Exception:
            log.exception("sequence %r was not let go", session_id)
        finally:
            tell()

    def _refuse(self, request: Any, responder: Responder, error: SessionError) -> None:
        """Answer with an error; the session stays as it is, unless the request ends it."""
        if request.flags() & END:
            closing = TurnRequest(request.correlation_id(), end=True)
            self._engine.submit(closing, lambda _: responder(error))
        else:
            responder(error)

    def _turn_request(self, request: Any, parameters: dict[str, Any]) -> TurnRequest:
        text, sampling = protocol.parse_turn(
            _array(request, protocol.TEXT_INPUT),
            _array(request, protocol.SAMPLING_PARAMETERS),
            self._settings,
        )
        flags = request.flags()
        return TurnRequest(
            session_id=request.correlation_id(),
            start=bool(flags & START),
            end=bool(flags & END),
            text=text,
            image_features=_features(request, self._settings.max_images_per_turn),
            history=protocol.parse_history(_array(request, protocol.HISTORY), self._settings),
            sampling=sampling,
            tenant=protocol.parse_tenant(parameters),
        )


class Responder:
    """The listener of one turn: turns its events into Triton responses.

    Args:
        sender: Triton's response sender of the request.
        responses: the thread that sends.
        whole: gather the answer and send it once, for callers that cannot stream.
        refused: is called before an error is sent, and calls in its turn what sends it.
    """

    def __init__(
        self,
        sender: Any,
        responses: ResponseThread,
        *,
        whole: bool,
        refused: Callable[[Callable[[], None]], None] | None,
    ) -> None:
        self._sender = sender
        self._responses = responses
        self._refused = refused
        self._pieces: list[str] | None = [] if whole else None
        self._watched_at = time.monotonic()
        self.turn_id = ""

    def __call__(self, event: Delta | SessionError) -> None:
        """Called on the engine's thread, in order; the last event is final."""
        if isinstance(event, SessionError) and self._refused is not None:
            self._refused(lambda: self._responses.put(self, event))
        else:
            self._responses.put(self, event)

    def send(self, event: Delta | SessionError) -> None:
        """Send one event; called on the response thread."""
        if isinstance(event, SessionError):
            self._sender.send(pb_utils.InferenceResponse(error=_triton_error(event)), flags=FINAL)
            return
        if self._pieces is not None:
            self._pieces.append(event.text)
            if not event.is_final:
                return
            event = event.with_text("".join(self._pieces))
        outputs = protocol.output_arrays(event)
        outputs[protocol.TURN_ID] = np.array([self._turn_to_watch(event)], dtype=np.object_)
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if event.is_final else 0)

    def give_up(self) -> None:
        """A response could not be sent: end the request, so that its client does not wait."""
        sentence = "the answer could not be sent; see the server's log"
        error = _triton_error(SessionError(ErrorCode.INTERNAL, sentence))
        with contextlib.suppress(Exception):  # ended already: nobody is there to tell
            self._sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)

    def _turn_to_watch(self, event: Delta) -> bytes:
        now = time.monotonic()
        if event.is_final or now - self._watched_at < WATCH_SECONDS:
            return b""
        self._watched_at = now
        return self.turn_id.encode()


def _array(request: Any, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _features(request: Any, most: int) -> torch.Tensor | None:
    """The request's image features [N, T, D]; None where it has no image (N = 0).

    Raises:
        SessionError: INVALID_ARG, N is above `most`: each would be looked at one by one.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, protocol.IMAGE_FEATURES)
    if tensor is None:
        return None
    # The request's memory is Triton's again once the answer is sent; the session outlives it.
    features = torch.utils.dlpack.from_dlpack(tensor.to_dlpack())
    if features.shape[0] > most:
        raise invalid(f"image_features has {features.shape[0]} pictures; a turn takes {most}")
    return features.clone() if features.shape[0] else None


def _triton_error(error: SessionError) -> Any:
    return pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code.name))
