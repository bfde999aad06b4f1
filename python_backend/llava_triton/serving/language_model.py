"""Triton's side of the session engine: sequences in, streams of text out."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_triton.checkpoint.identity import checkpoint_identity
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.contract import protocol
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import (
    ErrorCode,
    SessionError,
    as_session_error,
    error_from_text,
    invalid,
)
from llava_triton.contract.models import (
    ENCODED_PICTURES,
    HISTORY,
    IMAGE,
    IMAGE_FEATURES,
    IMAGE_LENGTHS,
    IMAGE_POSITIONS,
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
    TURN_ID,
)
from llava_triton.contract.operations import (
    NO_OPERATION,
    Ending,
    Operation,
)
from llava_triton.contract.settings import Settings
from llava_triton.device import compute_dtype, default_device, switch_threads_quickly, work_beside
from llava_triton.engine import Engine, TurnRequest
from llava_triton.engine.turn import Listener
from llava_triton.model.runner import ModelRunner
from llava_triton.pictures.feature_rows import unflattened
from llava_triton.serving.backend import Backend
from llava_triton.serving.metrics import Publisher, engine_metrics
from llava_triton.serving.response_thread import ResponseThread
from llava_triton.serving.turn_log import LoggedTurn, session_hash, without_ids
from llava_triton.serving.whole_answers import Outbox, WholeAnswer

if TYPE_CHECKING:
    from llava_triton.engine.journaling import EncodePictures, SessionJournal

log = logging.getLogger(__name__)

NOBODY = "\0"
"""No tenant's name: whoever sends it owns no session."""
WATCH_SECONDS = 0.1
"""How often a streaming turn asks disconnect_watch whether its client is still there."""


class LanguageModel:
    """`language_model`: one instance, because it owns every session."""

    def __init__(self, pb_utils: Any) -> None:
        self._backend = Backend(pb_utils)

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint and start the engine."""
        repository = Path(args["model_repository"])
        settings = Settings.of_repository(repository.parent)
        device = default_device()
        switch_threads_quickly(device)
        checkpoint = load_checkpoint(
            repository / args["model_version"] / "checkpoint",
            dtype=compute_dtype(settings.dtype, device),
            device=device,
        )
        identity = ""
        if settings.journal:
            identity = checkpoint_identity(repository / args["model_version"] / "checkpoint")
        self.serve(ModelRunner(checkpoint, settings), checkpoint.tokenizer, settings, identity)

    def serve(
        self, runner: ModelRunner, tokenizer: Any, settings: Settings, identity: str = ""
    ) -> None:
        """Start the engine.

        Args:
            runner: the language model.
            tokenizer: the checkpoint's.
            settings: limits.
            identity: the checkpoint's, where the server keeps a journal.
        """
        self._settings = settings
        self._device = runner.device
        self._width = runner.hidden_size
        self._responses = ResponseThread()
        self._stopping = False
        self._secret = uuid.uuid4().hex
        self._outbox = Outbox()
        # Its calls have no tensors. Those of `_encode_again` have, and come one by one.
        self._releases = ThreadPoolExecutor(1, "releases")
        self._encoding = threading.Lock()
        journal = _session_journal(settings, identity, self._encode_again, runner)
        self._engine = Engine(runner, tokenizer, settings, expired=self._let_go, journal=journal)
        self._metrics = Publisher(
            self._backend.pb_utils, lambda: engine_metrics(self._engine.statistics())
        )

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the engine; the answers follow through their response senders."""
        for request in requests:
            parameters = self._backend.parameters(request)
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
        stream = Responder(
            self._backend, sender, self._responses, self._engine.cancel, _is_watched(request)
        )
        tell: Listener = stream.put
        if whole:
            tell = partial(self._outbox.send, str(parameters[protocol.WHOLE_ANSWER]))
        if self._flags(request) == (True, False):
            tell = partial(self._release_if_refused, request.correlation_id(), tell)
        listener = WholeAnswer(tell) if whole else tell
        logged = None
        if self._settings.log_turns:
            logged = LoggedTurn(listener, request.correlation_id(), request.request_id())
        try:
            with work_beside(self._device):  # it copies the features
                turn = self._turn_request(request, parameters)
            ending = _ending(turn, parameters)
            if logged is not None:
                logged.asks(turn)
        except Exception as error:
            # Raising would fail every request of this call and is said to leak shared memory.
            self._refuse(request, logged or listener, as_session_error(error))
        else:
            if ending is None:
                if logged is not None and not _asks_nothing(turn):
                    listener = logged
                stream.turn_id = self._engine.submit(turn, listener)
                if logged is not None:
                    logged.turn_id = stream.turn_id
            elif ending.cancelled is None:
                self._engine.stop_answer(ending.session_id, turn.tenant, listener)
            else:
                self._engine.cancel_answer(
                    ending.session_id, turn.tenant, ending.cancelled, listener
                )
        if whole:  # the call that brought it ends here; the answer goes another way
            sender.send(flags=self._backend.final)

    def _is_between_models(self, request: Any, parameters: dict[str, Any]) -> bool:
        """Whether a request comes from another of our models or from here; it is answered then."""
        sender = request.get_response_sender()
        alone = self._flags(request) == (True, True)
        turn_id = parameters.get(protocol.CANCEL_TURN)
        if alone and turn_id and turn_id == request.correlation_id():
            self._engine.cancel(turn_id)
        elif alone and protocol.ROOM in parameters:
            error = self._engine.room_for_a_session(parameters[protocol.ROOM])
            if error is not None:
                self._backend.refuse(sender, error)
                return True
        elif not ((alone and protocol.MARK in parameters) or self._is_release(parameters)):
            return False
        sender.send(flags=self._backend.final)
        return True

    def _is_release(self, parameters: dict[str, Any]) -> bool:
        return parameters.get(protocol.RELEASE) == self._secret

    def _encode_again(self, items: Sequence[bytes], tenant: str) -> list[torch.Tensor]:
        """The features [T, D] of pictures of a session that is resumed.

        Raises:
            SessionError: what image_encoder answers.
        """
        pb_utils = self._backend.pb_utils
        features: list[torch.Tensor] = []
        with self._encoding:
            for part in _parts(items, self._settings):
                array = np.empty(len(part), dtype=np.object_)
                array[:] = part
                response = pb_utils.InferenceRequest(
                    model_name="image_encoder",
                    requested_output_names=[spec.name for spec in ENCODED_PICTURES],
                    inputs=[pb_utils.Tensor(IMAGE.name, array)],
                    parameters={protocol.TENANT: tenant} if tenant else {},
                    # Where the features lie matters little here, and GPU tensors of calls have
                    # their own dangers.
                    preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
                ).exec()
                if response.has_error():
                    raise error_from_text(response.error().message())
                rows, lengths = (
                    pb_utils.get_output_tensor_by_name(response, spec.name)
                    for spec in ENCODED_PICTURES
                )
                features += unflattened(
                    torch.utils.dlpack.from_dlpack(rows.to_dlpack()),
                    lengths.as_numpy(),
                    self._width,
                    self._settings.max_images_per_turn,
                )
        return features

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
                self._backend.tell(
                    "language_model",
                    {protocol.RELEASE: self._secret},
                    correlation_id=session_id,
                    flags=self._backend.end,
                )
        except SessionError as error:
            said = without_ids(str(error), session_id)
            log.warning("sequence %s was not let go: %s", session_hash(session_id), said)
        except Exception:
            log.exception("sequence %s was not let go", session_hash(session_id))
        finally:
            tell()

    def _refuse(self, request: Any, listener: Listener, error: SessionError) -> None:
        """Answer with an error; the session stays as it is, unless the request ends it."""
        try:
            tenant = protocol.parse_tenant(self._backend.parameters(request))
        except SessionError:
            tenant = NOBODY
        self._engine.not_taken(request.correlation_id(), tenant)
        if request.flags() & self._backend.end:
            closing = TurnRequest(request.correlation_id(), end=True, tenant=tenant)
            self._engine.submit(closing, lambda _: listener(error))
        else:
            listener(error)

    def _turn_request(self, request: Any, parameters: dict[str, Any]) -> TurnRequest:
        text, sampling = protocol.parse_turn(
            self._backend.array(request, TEXT_INPUT),
            self._backend.array(request, SAMPLING_PARAMETERS),
            self._settings,
        )
        start, end = self._flags(request)
        return TurnRequest(
            session_id=request.correlation_id(),
            start=start,
            end=end,
            text=text,
            image_features=self._features(request),
            image_positions=protocol.parse_positions(
                self._backend.array(request, IMAGE_POSITIONS), self._settings
            ),
            history=protocol.parse_history(self._backend.array(request, HISTORY), self._settings),
            sampling=sampling,
            tenant=protocol.parse_tenant(parameters),
            operation=Operation.from_parameters(parameters),
            request_id=request.request_id(),
        )

    def _features(self, request: Any) -> tuple[torch.Tensor, ...]:
        """The features [T, D] of each of the request's pictures.

        Raises:
            SessionError: INVALID_ARG, another size.
        """
        tensor = self._backend.pb_utils.get_input_tensor_by_name(request, IMAGE_FEATURES.name)
        lengths = self._backend.array(request, IMAGE_LENGTHS)
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

    def _flags(self, request: Any) -> tuple[bool, bool]:
        """Whether a request has the START flag, and whether END."""
        flags = request.flags()
        return bool(flags & self._backend.start), bool(flags & self._backend.end)


def _parts(items: Sequence[bytes], settings: Settings) -> Iterator[Sequence[bytes]]:
    """Pictures in as many parts as image_encoder takes them in."""
    part: list[bytes] = []
    for item in items:
        size = sum(map(len, part)) + len(item)
        most = settings.max_images_bytes_per_turn // 4
        if part and (size > most or len(part) == min(16, settings.max_images_per_turn)):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _session_journal(
    settings: Settings, identity: str, encode: EncodePictures, runner: ModelRunner
) -> SessionJournal | None:
    """The journal of sessions; None where the server keeps none."""
    if not settings.journal:
        return None
    from llava_triton.engine import journaling  # obstore need not be installed for others
    from llava_triton.journal.journal import Journal

    return journaling.SessionJournal(Journal(settings, identity), encode, runner)


def _ending(turn: TurnRequest, parameters: dict[str, Any]) -> Ending | None:
    """The end of another request's answer that a request asks for; None where it asks for none.

    Raises:
        SessionError: INVALID_ARG, it does more than that.
    """
    ending = Ending.from_parameters(parameters)
    if ending is None:
        return None
    alone = turn.start and turn.end and ending.session_id != turn.session_id
    if not alone or turn.has_message or turn.operation != NO_OPERATION:
        raise invalid(
            f"{ending.name} came with a turn, which would wait for the answer it ends; send it "
            "alone, with the sequence start and end flags and a sequence ID of its own"
        )
    return ending


def _asks_nothing(turn: TurnRequest) -> bool:
    """Whether a turn only finds out whether the engine answers, or has a session: it opens none
    that stays, ends none, and neither says nor shows anything."""
    return turn.start == turn.end and not turn.has_message and turn.operation == NO_OPERATION


def _is_watched(request: Any) -> bool:
    """Whether disconnect_watch looks after a request's client: it takes the turn's ID for that. A
    client that calls this model itself has no need of it."""
    return TURN_ID.name in request.requested_output_names()


class Responder:
    """Turns the events of a streamed turn into Triton responses.

    Args:
        backend: Triton.
        sender: Triton's response sender of the request.
        responses: the thread that sends.
        cancel: cancels a turn by its ID.
        watched: whether disconnect_watch asks for the client; else this does.
    """

    def __init__(
        self,
        backend: Backend,
        sender: Any,
        responses: ResponseThread,
        cancel: Callable[[str], None],
        watched: bool,
    ) -> None:
        self._backend = backend
        self._sender = sender
        self._responses = responses
        self._cancel = cancel
        self._watched = watched
        self._watched_at = time.monotonic()
        self.turn_id = ""

    def put(self, event: Delta | SessionError) -> None:
        """Called on the engine's thread, in order; the last event is final."""
        self._responses.put(self, event)

    def send(self, event: Delta | SessionError) -> None:
        """Send one event; called on the response thread."""
        if isinstance(event, SessionError):
            self._backend.refuse(self._sender, event)
            return
        arrays = ANSWER.to_arrays(event)
        looked_after = self._turn_to_watch(event)
        if self._watched:
            arrays[TURN_ID.name] = TURN_ID.to_array(looked_after)
        # Before the last response, behind which the sender may not be asked.
        elif looked_after and self._sender.is_cancelled():
            self._cancel(looked_after)
        response = self._backend.response(arrays)
        self._sender.send(response, flags=self._backend.final if event.is_final else 0)

    def give_up(self) -> None:
        """A response could not be sent: end the request, so that its client does not wait."""
        sentence = "the answer could not be sent; see the server's log"
        with contextlib.suppress(Exception):  # ended already: nobody is there to tell
            self._backend.refuse(self._sender, SessionError(ErrorCode.INTERNAL, sentence))

    def _turn_to_watch(self, event: Delta) -> str:
        now = time.monotonic()
        if event.is_final or now - self._watched_at < WATCH_SECONDS:
            return ""
        self._watched_at = now
        return self.turn_id
