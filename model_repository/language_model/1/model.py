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
from llava_triton.engine.turn import Listener
from llava_triton.errors import ErrorCode, SessionError, as_session_error, invalid
from llava_triton.flat_features import unflattened
from llava_triton.metrics import Publisher, engine_metrics
from llava_triton.responses import ResponseThread
from llava_triton.settings import Settings
from llava_triton.whole_answers import Outbox, WholeAnswer

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
        runner = ModelRunner(checkpoint, settings)
        self._width = runner.hidden_size
        self._responses = ResponseThread()
        self._stopping = False
        self._secret = uuid.uuid4().hex
        self._outbox = Outbox()
        # The only thread that makes BLS calls; they have no tensors.
        self._releases = ThreadPoolExecutor(1, "releases")
        self._engine = Engine(runner, checkpoint.tokenizer, settings, expired=self._let_go)
        self._metrics = Publisher(pb_utils, lambda: engine_metrics(self._engine.statistics()))

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the engine; the answers follow through their response senders."""
        for request in requests:
            parameters = json.loads(request.parameters() or "{}")
            if not self._is_between_models(request, parameters):
                self._take(request, parameters)

    def finalize(self) -> None:
        """Free every session."""
        self._stopping = True
        self._metrics.stop()
        self._engine.shutdown()
        self._releases.shutdown()
        self._outbox.close()
        self._responses.stop()

    def _take(self, request: Any, parameters: dict[str, Any]) -> None:
        """Hand a turn to the engine, or tell why not."""
        sender, whole = request.get_response_sender(), protocol.WHOLE_ANSWER in parameters
        stream = Responder(sender, self._responses)
        tell: Listener = stream.put
        if whole:
            tell = partial(self._outbox.send, str(parameters[protocol.WHOLE_ANSWER]))
        if request.flags() & (START | END) == START:
            tell = partial(self._release_if_refused, request.correlation_id(), tell)
        listener = WholeAnswer(tell) if whole else tell
        try:
            with work_beside(self._device):  # it copies the features
                turn = self._turn_request(request, parameters)
        except Exception as error:
            # Raising would fail every request of this call and is said to leak shared memory.
            self._refuse(request, listener, as_session_error(error))
        else:
            stream.turn_id = self._engine.submit(turn, listener)
        if whole:  # the call that brought it ends here; the answer goes another way
            sender.send(flags=FINAL)

    def _is_between_models(self, request: Any, parameters: dict[str, Any]) -> bool:
        """Whether a request comes from another of our models or from here; it is answered then."""
        sender = request.get_response_sender()
        alone = request.flags() & (START | END) == START | END
        turn_id = parameters.get(protocol.CANCEL_TURN)
        if alone and turn_id and turn_id == request.correlation_id():
            self._engine.cancel(turn_id)
        elif alone and protocol.ROOM in parameters:
            error = self._engine.room_for_a_session(parameters[protocol.ROOM])
            if error is not None:
                _send_error(sender, error)
                return True
        elif not ((alone and protocol.MARK in parameters) or self._is_release(parameters)):
            return False
        sender.send(flags=FINAL)
        return True

    def _is_release(self, parameters: dict[str, Any]) -> bool:
        return parameters.get(protocol.RELEASE) == self._secret

    def _let_go(self, session_id: int | str) -> None:
        """The engine has closed a session by itself: Triton lets its sequence go, too."""
        if not self._stopping:
            self._releases.submit(self._release_now, session_id, lambda: None)

    def _release_if_refused(
        self, session_id: int | str, tell: Listener, event: Delta | SessionError
    ) -> None:
        """A session that was not opened: before its client hears of it, Triton lets its sequence
        go. It would keep it until its idle limit, and has places for so many only."""
        if isinstance(event, SessionError) and not self._stopping:  # else it lets everything go
            self._releases.submit(self._release_now, session_id, partial(tell, event))
        else:
            tell(event)

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

    def _refuse(self, request: Any, listener: Listener, error: SessionError) -> None:
        """Answer with an error; the session stays as it is, unless the request ends it."""
        if request.flags() & END:
            closing = TurnRequest(request.correlation_id(), end=True)
            self._engine.submit(closing, lambda _: listener(error))
        else:
            listener(error)

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
            image_features=self._features(request),
            history=protocol.parse_history(_array(request, protocol.HISTORY), self._settings),
            sampling=sampling,
            tenant=protocol.parse_tenant(parameters),
        )

    def _features(self, request: Any) -> tuple[torch.Tensor, ...]:
        """The features [T, D] of each of the request's pictures.

        Raises:
            SessionError: INVALID_ARG, another size.
        """
        tensor = pb_utils.get_input_tensor_by_name(request, protocol.IMAGE_FEATURES)
        lengths = _array(request, protocol.IMAGE_LENGTHS)
        if tensor is None and lengths is None:
            return ()
        if tensor is None or lengths is None:
            raise invalid("image_features and image_lengths come together; send both or neither")
        # The request's memory is Triton's again once the answer is sent; the session outlives it.
        return unflattened(
            torch.utils.dlpack.from_dlpack(tensor.to_dlpack()),
            lengths,
            self._width,
            self._settings.max_images_per_turn,
        )


class Responder:
    """Turns the events of a streamed turn into Triton responses.

    Args:
        sender: Triton's response sender of the request.
        responses: the thread that sends.
    """

    def __init__(self, sender: Any, responses: ResponseThread) -> None:
        self._sender = sender
        self._responses = responses
        self._watched_at = time.monotonic()
        self.turn_id = ""

    def put(self, event: Delta | SessionError) -> None:
        """Called on the engine's thread, in order; the last event is final."""
        self._responses.put(self, event)

    def send(self, event: Delta | SessionError) -> None:
        """Send one event; called on the response thread."""
        if isinstance(event, SessionError):
            _send_error(self._sender, event)
            return
        outputs = protocol.output_arrays(event)
        outputs[protocol.TURN_ID] = np.array([self._turn_to_watch(event)], dtype=np.object_)
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if event.is_final else 0)

    def give_up(self) -> None:
        """A response could not be sent: end the request, so that its client does not wait."""
        sentence = "the answer could not be sent; see the server's log"
        with contextlib.suppress(Exception):  # ended already: nobody is there to tell
            _send_error(self._sender, SessionError(ErrorCode.INTERNAL, sentence))

    def _turn_to_watch(self, event: Delta) -> bytes:
        now = time.monotonic()
        if event.is_final or now - self._watched_at < WATCH_SECONDS:
            return b""
        self._watched_at = now
        return self.turn_id.encode()


def _array(request: Any, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _send_error(sender: Any, error: SessionError) -> None:
    told = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code.name))
    sender.send(pb_utils.InferenceResponse(error=told), flags=FINAL)
