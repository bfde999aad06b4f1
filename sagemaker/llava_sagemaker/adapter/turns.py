"""One turn to Triton over gRPC, and the pieces of its answer.

The raw messages of Triton's protocol, without numpy: a piece of an answer passes through here for
every few tokens of every session.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import grpc
from tritonclient.grpc import service_pb2

from llava_sagemaker.adapter.json_body import LongString, too_long
from llava_sagemaker.adapter.off_loop import off_loop
from llava_triton.contract import protocol
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError, error_from_text
from llava_triton.contract.models import (
    HISTORY,
    IMAGE,
    IMAGE_POSITIONS,
    MODELS,
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
    TEXTS,
)
from llava_triton.contract.operations import CANCEL_ANSWER, Ending
from llava_triton.contract.positions import Positions

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
MOST_UNHEARD = 128
"""So many turns at most are on their way to language_model past the ensemble, which bounds the
others; many more that wait there would end Triton (`llava_triton.serving.bounded_backlog`)."""
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # Triton is on this machine
    # After Triton has died: its successor is found within a second, not within two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
LEFT_SECONDS = 60.0
"""A turn whose client has gone, and that cannot be undone in so long, has its call cancelled."""
_PLAIN = {spec.name for spec in MODELS["language_model"].inputs if spec in TEXTS}
"""What clients send to language_model itself; the rest of its inputs is between the models."""
_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size
"""Before each element."""
_RAW_CONTENTS = bytes([7 << 3 | 2])
"""What comes before each of the message's `raw_input_contents`: field 7, so many bytes."""


class Tensor(NamedTuple):
    """A BYTES tensor [n], its elements each behind its length."""

    elements: int
    """n."""
    pieces: tuple[bytes, ...]
    """What it contains, cut anywhere."""

    @property
    def size(self) -> int:
        """Bytes of what it contains."""
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class TritonTurn:
    """One turn of one session, as the models take it."""

    session_id: str
    start: bool = False
    end: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Input tensors by name, all BYTES [n]."""
    tenant: str = protocol.NO_TENANT
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    """Of the request, see `llava_triton.contract.operations`."""

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def message(self, direct: bool) -> Any:
        """The protocol's message, all but the contents of its tensors.

        Args:
            direct: whether it goes to language_model, or else through the ensemble.
        """
        request = service_pb2.ModelInferRequest(model_name="llava_stream")
        if direct:
            request.model_name = "language_model"
            # Not all: who does not ask for the turn's ID is looked after by language_model itself.
            for output in ANSWER.outputs:
                request.outputs.add(name=output.name)
        request.parameters["sequence_id"].string_param = self.session_id
        request.parameters["sequence_start"].bool_param = self.start
        request.parameters["sequence_end"].bool_param = self.end
        if self.tenant:
            request.parameters[protocol.TENANT].string_param = self.tenant
        for name, value in self.parameters.items():
            given = request.parameters[name]
            if isinstance(value, bool):
                given.bool_param = value
            elif isinstance(value, int):
                given.int64_param = value
            else:
                given.string_param = value
        for name, tensor in self.tensors.items():
            described = request.inputs.add()
            described.name = name
            described.datatype = "BYTES"
            described.shape.append(tensor.elements)
        return request

    def written(self, request_id: str, direct: bool) -> bytes:
        """The message as it goes over the wire.

        Args:
            request_id: comes back with each piece of the answer.
            direct: see `message`.
        """
        message = self.message(direct)
        message.id = request_id
        # Fields of a message may follow one another in any order. So the contents, which may be
        # large, are copied once only, and joining bytes lets the interpreter's lock go meanwhile.
        parts = [message.SerializeToString()]
        for tensor in self.tensors.values():
            parts += (_RAW_CONTENTS, _varint(tensor.size), *tensor.pieces)
        return b"".join(parts)


def turn(
    session_id: str,
    *,
    start: bool = False,
    end: bool = False,
    text: str | None = None,
    images: Sequence[bytes | LongString] = (),
    positions: Positions = None,
    sampling: dict[str, Any] | None = None,
    history: str | None = None,
    parameters: Mapping[str, int | str] | None = None,
) -> TritonTurn:
    """A turn from plain values; those that are empty are left out.

    Args:
        session_id: Triton's sequence ID.
        start, end: the sequence flags.
        text: the question.
        images: encoded files, as they are, in base64 or as data URIs.
        positions: of the question's pictures, the input `image_positions`.
        sampling: the input `sampling_parameters`.
        history: the input `history`, JSON.
        parameters: of the request.
    """
    strings: dict[str, Sequence[bytes | LongString]] = {
        TEXT_INPUT.name: [utf8(text)] if text else [],
        IMAGE.name: images,
        IMAGE_POSITIONS.name: [] if positions is None else [json.dumps(positions).encode()],
        SAMPLING_PARAMETERS.name: [_json(sampling)] if sampling else [],
        HISTORY.name: [utf8(history)] if history else [],
    }
    tensors = {name: packed(values) for name, values in strings.items() if values}
    return TritonTurn(session_id, start, end, tensors, parameters=parameters or {})


def _json(sampling: dict[str, Any]) -> bytes:
    def refuse(value: Any) -> Any:
        raise too_long("a sampling parameter", value)

    return json.dumps(sampling, default=refuse).encode()


def utf8(text: str) -> bytes:
    """Text for Triton. JSON can name halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode(errors="replace")


def packed(values: Sequence[bytes | LongString]) -> Tensor:
    """The tensor with these elements."""
    pieces: list[bytes] = []
    for value in values:
        if isinstance(value, LongString):
            pieces += (_LENGTH.pack(value.size), *value.pieces)
        else:
            pieces += (_LENGTH.pack(len(value)), value)
    return Tensor(len(values), tuple(pieces))


def _varint(number: int) -> bytes:
    """A number as the protocol's messages write it: seven bits a byte, the lowest first."""
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


class Triton:
    """The connection to Triton; make it inside the event loop that uses it.

    Args:
        address: `host:port` of Triton's gRPC endpoint.
    """

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, _OPTIONS)
        self._infer = self.channel.stream_stream(
            _METHOD,
            request_serializer=None,  # `TritonTurn.written`
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._idle: list[Any] = []
        """Calls whose last turn has ended."""
        self._ways = _Ways()
        self._left: set[asyncio.Task[None]] = set()
        """What undoes turns that nobody waits for."""

    async def pieces(self, turn: TritonTurn) -> AsyncGenerator[Delta, None]:
        """Send a turn; the pieces of its answer as they come, the last one final.

        Closing the generator early undoes the turn. (Turns side by side have calls of their own:
        what a call brings, it brings in order. One whose turn has ended serves the next turn.)

        Raises:
            SessionError: the engine or Triton refused the turn, or it failed.
            grpc.aio.AioRpcError: Triton cannot be reached.
        """
        answer = _Answer(turn.session_id, turn.tenant)
        undone = CANCEL_ANSWER not in turn.parameters
        reading = asyncio.create_task(self._read(turn, answer))
        del turn  # with its pictures: the answer may take long
        try:
            ended = False
            while not ended:
                piece = await answer.arrived.get()
                ended = _is_last(piece)
                if isinstance(piece, Exception):
                    try:
                        raise piece
                    finally:  # it would keep this frame, and this frame it
                        del piece
                yield piece
        finally:
            if undone and answer.is_sent and not reading.done():
                self._leave(answer, reading)
            elif not ended:
                reading.cancel()

    async def _read(self, turn: TritonTurn, answer: _Answer) -> None:
        """Send a turn and read its answer to the end."""
        call, usable = None, False
        try:
            with self._ways.of(turn.session_id, turn.tensors.keys() <= _PLAIN) as way:
                message = await off_loop(turn.size, turn.written, answer.request_id, way.direct)
                del turn  # with its pictures: the answer may take long
                call = self._call()
                with contextlib.suppress(asyncio.InvalidStateError):  # failed: reading says why
                    await call.write(message)
                del message
                answer.is_sent = True
                last = False
                while not last:
                    response = await _response(call, answer.request_id)
                    if response is None:
                        break
                    way.heard()
                    piece = _piece(response)
                    last = _is_last(piece)
                    # An error without an ID may be the call's own.
                    usable = last and response.infer_response.id == answer.request_id
                    answer.arrived.put_nowait(piece)
        except Exception as error:
            answer.arrived.put_nowait(error.with_traceback(None))
        finally:
            if usable:
                self._idle.append(call)
            else:
                if call is not None:
                    call.cancel()
                answer.arrived.put_nowait(SessionError(ErrorCode.INTERNAL, "the answer broke off"))

    def _leave(self, answer: _Answer, reading: asyncio.Task[None]) -> None:
        leaving = asyncio.create_task(self._undo(answer, reading))
        self._left.add(leaving)
        leaving.add_done_callback(self._left.discard)

    async def _undo(self, answer: _Answer, reading: asyncio.Task[None]) -> None:
        """Undo a turn whose client has gone, by a request. Where the call of a turn that waits is
        cancelled, Triton 2.51 ends the whole sequence."""
        undoing = TritonTurn(
            uuid.uuid4().hex,
            start=True,
            end=True,
            tenant=answer.tenant,
            parameters=Ending(answer.session_id, answer.request_id).to_parameters(),
        )
        try:
            async with asyncio.timeout(LEFT_SECONDS):
                last = False
                while not last:
                    await self.whole(undoing)
                    # Else the turn had not reached the engine: with its next piece, it has.
                    last = await answer.goes_on()
        except Exception:  # Triton is gone or silent: the connection tells it, if anything does
            reading.cancel()

    def _call(self) -> Any:
        while self._idle:
            call = self._idle.pop()
            if not call.done():  # else Triton has ended it
                return call
        return self._infer()

    async def whole(self, turn: TritonTurn) -> Delta:
        """Send a turn; its whole answer as one final piece. Errors as for `pieces`."""
        return ANSWER.joined([piece async for piece in self.pieces(turn)])

    async def close(self) -> None:
        """Let the connection go, and all calls with it."""
        await self.channel.close()


class _Ways:
    """Which turns go through the ensemble, and which past it to language_model.

    Past it a turn costs Triton half as much, each piece of its answer too. It must have no picture,
    must not overtake an earlier turn of its session, and must not be one of too many that wait.
    """

    def __init__(self) -> None:
        self._in_ensemble: Counter[str] = Counter()
        """Turns there, by session."""
        self._unheard = 0
        """Turns past it that have not begun."""

    @contextlib.contextmanager
    def of(self, session_id: str, plain: bool) -> Iterator[_Way]:
        """The way of a turn, until its answer has been read.

        Args:
            session_id: of its session.
            plain: whether language_model takes all its inputs: it has no picture.
        """
        free = session_id not in self._in_ensemble and self._unheard < MOST_UNHEARD
        way = _Way(free and plain, self._heard)
        if way.direct:
            self._unheard += 1
        else:
            self._in_ensemble[session_id] += 1
        try:
            yield way
        finally:
            way.heard()
            if not way.direct:
                self._in_ensemble[session_id] -= 1
                if not self._in_ensemble[session_id]:
                    del self._in_ensemble[session_id]

    def _heard(self) -> None:
        self._unheard -= 1


@dataclass
class _Way:
    direct: bool
    """Past the ensemble."""
    tell: Callable[[], None]
    """Is told once that a direct turn has begun, or has ended."""
    is_heard: bool = False

    def heard(self) -> None:
        """Triton has answered."""
        if self.direct and not self.is_heard:
            self.is_heard = True
            self.tell()


@dataclass
class _Answer:
    """An answer on its way."""

    session_id: str
    tenant: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    """What nobody has taken yet."""
    is_sent: bool = False
    """Whether its turn is on its way to the engine."""

    async def goes_on(self) -> bool:
        """Forget what has come, and wait for the next piece; whether the answer has ended."""
        last = False
        while not (last or self.arrived.empty()):
            last = _is_last(self.arrived.get_nowait())
        return last or _is_last(await self.arrived.get())


def _is_last(piece: Delta | Exception) -> bool:
    return isinstance(piece, Exception) or piece.is_final


async def _response(call: Any, request_id: str) -> Any:
    """The next response to a turn, which may be an error; None where the call has ended."""
    while (response := await call.read()) is not grpc.aio.EOF:
        if response.infer_response.id in (request_id, ""):
            return response
        # An earlier turn's of this call: nobody else may see it.
    return None


def _piece(response: Any) -> Delta | Exception:
    if response.error_message:
        return error_from_text(response.error_message)
    return _delta(response.infer_response)


def _delta(response: Any) -> Delta:
    names = (tensor.name for tensor in response.outputs)
    return ANSWER.from_raw(dict(zip(names, response.raw_output_contents, strict=True)))


def limited(turn: TritonTurn, seconds: float) -> TritonTurn:
    """The same turn, its answer cut when so many seconds have passed; a shorter limit of its own
    stands. Sampling parameters that cannot be read are left for the engine to refuse."""
    given = turn.tensors.get(SAMPLING_PARAMETERS.name)
    try:
        sampling = json.loads(b"".join(given.pieces)[_LENGTH.size :] if given else b"{}")
        own = sampling.get("max_seconds")
        sampling["max_seconds"] = seconds if own is None else min(own, seconds)
        data = packed([json.dumps(sampling).encode()])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return turn
    return replace(turn, tensors={**turn.tensors, SAMPLING_PARAMETERS.name: data})
