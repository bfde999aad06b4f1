"""What a transport is: one turn out, its answer back. One file each: grpc.py, http.py,
sagemaker.py; replay.py wraps any of them."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from types import ModuleType
from typing import Any

import numpy as np

from llava_triton.contract import protocol
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import (
    CONNECTION,
    MODEL_PROCESS,
    ErrorCode,
    SessionError,
    error_from_text,
    invalid,
)
from llava_triton.contract.history import PastTurn, history_to_json
from llava_triton.contract.models import (
    HISTORY,
    IMAGE,
    IMAGE_POSITIONS,
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
)
from llava_triton.contract.operations import NO_OPERATION, REWIND, Ending, Operation
from llava_triton.contract.positions import Positions
from llava_triton.contract.tensors import TensorSpec


@dataclass(frozen=True)
class TurnMessage:
    """One turn of one session, as a client sends it."""

    session_id: int | str
    start: bool = False
    end: bool = False
    text: str | None = None
    images: Sequence[bytes] = ()
    """Encoded pictures, and videos as elements of the input `image` hold them."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """See `llava_triton.model.sampling.SamplingParameters`."""
    history: Sequence[PastTurn] = ()
    """What was said before, where the turn opens a session; `images` begins with its pictures."""
    operation: Operation = NO_OPERATION
    """What is done to the session first."""
    ending: Ending | None = None
    """Of another turn's answer; the message has no other meaning then."""
    request_id: str = ""
    """Names the turn to who cancels it."""
    positions: Positions = None
    """Of the pictures and videos in the text."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Request parameters that say what the inputs do not."""
        ending = {} if self.ending is None else self.ending.to_parameters()
        return self.operation.to_parameters() | ending

    def request(self, triton: ModuleType, common: Mapping[str, Any]) -> dict[str, Any]:
        """What `infer` and its like of `tritonclient.grpc` or `tritonclient.http` take, besides the
        model's name.

        Args:
            triton: that module.
            common: parameters of every request of a transport.
        """
        return {
            "inputs": self.inputs(triton),
            "request_id": self.request_id,
            "sequence_id": self.session_id,
            "sequence_start": self.start,
            "sequence_end": self.end,
            "parameters": {**common, **self.parameters},
        }

    def inputs(self, triton: ModuleType) -> list[Any]:
        """The input tensors, of `tritonclient.grpc` or `tritonclient.http`."""
        strings: dict[TensorSpec, Sequence[bytes]] = {}
        if self.text is not None:
            strings[TEXT_INPUT] = [_utf8(self.text)]
        if self.images:
            strings[IMAGE] = self.images
        if self.positions is not None:
            strings[IMAGE_POSITIONS] = [json.dumps(self.positions).encode()]
        if self.sampling:
            strings[SAMPLING_PARAMETERS] = [json.dumps(self.sampling).encode()]
        if self.history:
            strings[HISTORY] = [history_to_json(list(self.history)).encode()]
        return [_bytes_input(triton, spec.name, values) for spec, values in strings.items()]


def regenerating(session_id: int | str, sampling: dict[str, Any]) -> TurnMessage:
    """Answers a session's last question again."""
    return TurnMessage(session_id, sampling=sampling, operation=Operation(regenerate=True))


def rewinding(session_id: int | str, turns: int) -> TurnMessage:
    """Takes a session back to so many completed turns; INVALID_ARG where that is no number."""
    return TurnMessage(session_id, operation=Operation.from_parameters({REWIND: turns}))


def resuming(session_id: int | str, images: Sequence[bytes] = ()) -> TurnMessage:
    """Brings a session back as the servers' journal has it, and shows it pictures."""
    return TurnMessage(session_id, start=True, images=images, operation=Operation(resume=True))


def forking(source: int | str, session_id: int | str | None) -> TurnMessage:
    """Opens a session, under a random ID if None is given, as a copy of another one."""
    return TurnMessage(
        uuid.uuid4().hex if session_id is None else session_id,
        start=True,
        operation=Operation(fork=source),
    )


def stopping(session_id: int | str) -> TurnMessage:
    """Ends a session's running answer as it is, from outside the session."""
    return TurnMessage(uuid.uuid4().hex, start=True, end=True, ending=Ending(session_id))


def named(turn: TurnMessage) -> TurnMessage:
    """The same turn with a request ID, so that it can be cancelled."""
    return replace(turn, request_id=uuid.uuid4().hex)


def cancelling(turn: TurnMessage) -> TurnMessage:
    """Undoes a turn that has a request ID, from outside its session."""
    ending = Ending(turn.session_id, turn.request_id)
    return TurnMessage(uuid.uuid4().hex, start=True, end=True, ending=ending)


def tenant_parameters(tenant: str | None) -> dict[str, str]:
    """What every request of a tenant says.

    Raises:
        SessionError: INVALID_ARG, the tenant's name is none.
    """
    parameters = {} if tenant is None else {protocol.TENANT: tenant}
    protocol.parse_tenant(parameters)
    return parameters


class LostConnectionError(SessionError):
    """The server, or the way to it, is gone: UNAVAILABLE, and nobody knows what became of the turn.

    Other UNAVAILABLE errors are a server's own answers.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, sentence)


class Transport(ABC):
    """A way to a server. Its methods raise SessionError, whatever goes wrong.

    Args:
        tenant: whose turns it sends; None: nobody's in particular.

    Raises:
        SessionError: INVALID_ARG, the tenant's name is none.
    """

    def __init__(self, tenant: str | None = None) -> None:
        self.tenant = tenant
        self.parameters = tenant_parameters(tenant)
        """Of every request."""

    def open(self, turn: TurnMessage) -> tuple[int | str, Delta]:
        """Send a turn that opens a session; the session's ID and the whole answer.

        The ID is the turn's, unless the server chooses it.
        """
        return turn.session_id, self.ask(turn)

    def fork(self, source: int | str, session_id: int | str | None) -> tuple[Transport, int | str]:
        """Open a session as a copy of another one.

        Args:
            source: the session to copy.
            session_id: of the new one; None: a random one.

        Returns:
            A connection of its own, and its ID.
        """
        other = self.another()
        try:
            opened, _ = other.open(forking(source, session_id))
        except BaseException:
            other.close()
            raise
        return other, opened

    def stop_answer(self, session_id: int | str) -> Delta:
        """End a session's running answer as it is; may be called while it is streamed."""
        return self.ask(stopping(session_id))

    def another(self) -> Transport:
        """A connection like this one; INVALID_ARG where a transport has only one."""
        raise invalid("sessions of this transport cannot be forked")

    @abstractmethod
    def ask(self, turn: TurnMessage) -> Delta:
        """Send a turn; its whole answer as one final piece."""

    @abstractmethod
    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        """Send a turn at the first `next`; the pieces of its answer, the last one final.

        Closing the generator early cancels the turn.
        """

    @abstractmethod
    def close(self) -> None:
        """Let the connection go."""


def delta_of(result: Any) -> Delta:
    """A response of tritonclient as a piece of an answer."""
    return ANSWER.from_arrays(result.as_numpy)


def session_error(error: Exception, address: str) -> SessionError:
    """What went wrong, in our terms; connection faults by any library included."""
    text = str(error)
    told = error_from_text(text)
    if told.subject == MODEL_PROCESS:  # until the whole server is ended and started again
        return LostConnectionError(
            f"a model of the server at {address} has died; the server is started again, if "
            f"somebody watches it ({told.sentence})"
        )
    if isinstance(error, OSError | HTTPException) or told.subject == CONNECTION:
        return LostConnectionError(f"no server answers at {address}; is it running? ({text})")
    return told


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            f"the text cannot be sent: its character {error.start} is half of a surrogate pair"
        ) from error


def _bytes_input(triton: ModuleType, name: str, values: Sequence[bytes]) -> Any:
    array = np.empty(len(values), dtype=np.object_)
    array[:] = list(values)
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor
