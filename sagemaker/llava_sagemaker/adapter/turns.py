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
from collections.abc import AsyncGenerator, Mapping, Sequence
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
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
)
from llava_triton.contract.positions import Positions

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_MODEL = "llava_stream"
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
"""A turn whose client has gone is cancelled after so long even if it has not begun."""
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
class Turn:
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

    def message(self) -> Any:
        """The protocol's message, all but the contents of its tensors."""
        request = service_pb2.ModelInferRequest(model_name=_MODEL)
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

    def written(self, turn_id: str) -> bytes:
        """The message as it goes over the wire.

        Args:
            turn_id: comes back with each piece of the answer.
        """
        message = self.message()
        message.id = turn_id
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
) -> Turn:
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
    return Turn(session_id, start, end, tensors, parameters=parameters or {})


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
            request_serializer=None,  # `Turn.written`
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._idle: list[Any] = []
        """Calls whose last turn has ended."""
        self._left: set[asyncio.Task[Any]] = set()
        """Turns that nobody waits for and that have not begun."""

    async def pieces(self, turn: Turn) -> AsyncGenerator[Delta, None]:
        """Send a turn; the pieces of its answer as they come, the last one final.

        Closing the generator early cancels the turn. (Turns side by side have calls of their own:
        Triton cancels calls, not turns. One whose turn has ended serves the next turn.)

        Raises:
            SessionError: the engine or Triton refused the turn, or it failed.
            grpc.aio.AioRpcError: Triton cannot be reached.
        """
        turn_id, opens = uuid.uuid4().hex, turn.start
        message = await off_loop(turn.size, turn.written, turn_id)
        call = self._call()
        begins = asyncio.create_task(_begin(call, message, turn_id))
        del message, turn  # with their pictures: the answer may take long
        ended = False
        try:
            # An opening that is left has no session to lose.
            response = await (begins if opens else asyncio.shield(begins))
            while response is not None:
                piece = _delta(response.infer_response)
                ended = piece.is_final
                yield piece
                response = None if ended else await _response(call, turn_id)
        finally:
            if ended:
                self._idle.append(call)
            elif begins.done():
                call.cancel()
            else:
                self._leave(call, begins)
            # With an exception in it, it would keep this frame, and this frame it.
            del begins

    def _leave(self, call: Any, begins: asyncio.Task[Any]) -> None:
        """Cancel a turn whose client has gone, as soon as it begins. Not earlier: where a cancelled
        turn waits for others of its session, Triton 2.51 ends the whole sequence."""
        late = asyncio.get_running_loop().call_later(LEFT_SECONDS, call.cancel)

        def cancel(begins: asyncio.Task[Any]) -> None:
            self._left.discard(begins)
            if not begins.cancelled():
                begins.exception()  # nobody is there to hear of it
            late.cancel()
            call.cancel()

        self._left.add(begins)
        begins.add_done_callback(cancel)

    def _call(self) -> Any:
        while self._idle:
            call = self._idle.pop()
            if not call.done():  # else Triton has ended it
                return call
        return self._infer()

    async def whole(self, turn: Turn) -> Delta:
        """Send a turn; its whole answer as one final piece. Errors as for `pieces`."""
        pieces = [piece async for piece in self.pieces(turn)]
        if not pieces or not pieces[-1].is_final:
            raise SessionError(ErrorCode.INTERNAL, "the answer broke off")
        return ANSWER.joined(pieces)

    async def close(self) -> None:
        """Let the connection go, and all calls with it."""
        await self.channel.close()


async def _begin(call: Any, message: bytes, turn_id: str) -> Any:
    """Send a turn and wait for the first response to it; as `_response`."""
    with contextlib.suppress(asyncio.InvalidStateError):  # failed: reading says why
        await call.write(message)
    del message  # with its pictures: the answer may take long
    return await _response(call, turn_id)


async def _response(call: Any, turn_id: str) -> Any:
    """The next response to a turn; None where the call has ended.

    Raises:
        SessionError: it is an error.
    """
    while (response := await call.read()) is not grpc.aio.EOF:
        if response.infer_response.id not in (turn_id, ""):
            continue  # an earlier turn's of this call: nobody else may see it
        if response.error_message:
            raise error_from_text(response.error_message)
        return response
    return None


def _delta(response: Any) -> Delta:
    names = (tensor.name for tensor in response.outputs)
    return ANSWER.from_raw(dict(zip(names, response.raw_output_contents, strict=True)))


def limited(turn: Turn, seconds: float) -> Turn:
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
