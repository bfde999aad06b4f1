"""gRPC: whole answers through `llava`, streamed ones through `llava_stream`."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Generator
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from llava_triton.client.transport import (
    LostConnectionError,
    Transport,
    TurnMessage,
    cancelling,
    delta_of,
    named,
    session_error,
)
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError

CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Connections of its own: gRPC makes those that are shared wait after a failure, up to two
    # minutes, before it looks for their server again.
    ("grpc.use_local_subchannel_pool", 1),
]

BEGIN_SECONDS = 5.0
"""A turn that is left before its first response is cancelled so late at the latest: cancelled
before it has begun, it would cost its session (docs/sessions.md#session-rules)."""
CANCEL_SECONDS = 5.0
"""A server that does not answer for so long has gone, or hangs."""


class GrpcTransport(Transport):
    """A connection to `host:port`, with one gRPC stream that all streamed turns share.

    Args:
        address: `host:port`.
        tenant: see `Transport`.
    """

    def __init__(self, address: str, tenant: str | None = None) -> None:
        super().__init__(tenant)
        self._address = address
        self._client = _connect(address)
        self._arrived: queue.SimpleQueue[tuple[Any, Exception | None]] | None = None

    def another(self) -> GrpcTransport:
        """A connection to the same address."""
        return GrpcTransport(self._address, self.tenant)

    def ask(self, turn: TurnMessage) -> Delta:
        """One call, one answer."""
        try:
            result = self._client.infer("llava", **turn.request(triton, self.parameters))
        except InferenceServerException as error:
            raise self._told(error) from error
        return delta_of(result)

    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        """Pieces as they come; left early, the turn is cancelled."""
        turn = named(turn)
        begun = ended = False
        try:
            arrived = self._send(turn.request(triton, self.parameters))
            while not ended:
                result, error = arrived.get()
                if error is not None:
                    ended = is_of_a_turn(error)
                    raise error
                begun = True
                delta = delta_of(result)
                ended = delta.is_final
                yield delta
        except InferenceServerException as error:
            if not ended:  # the stream's own: it is of no use any more
                ended = True
                self._break_stream()
            raise self._told(error) from error
        finally:
            if not (ended or begun or turn.start) and self._arrived is not None:  # Ctrl-C
                with contextlib.suppress(queue.Empty):
                    self._arrived.get(timeout=BEGIN_SECONDS)
            if not ended and not (begun and self._cancel(turn)):
                self._break_stream()

    def close(self) -> None:
        """Let the stream and the connection go."""
        if self._arrived is not None:
            self._client.stop_stream()
        self._client.close()

    def _told(self, error: InferenceServerException) -> SessionError:
        told = session_error(error, self._address)
        if isinstance(told, LostConnectionError):
            self._client.close()
            self._client = _connect(self._address)
            self._arrived = None
        return told

    def _send(self, request: dict[str, Any]) -> queue.SimpleQueue[tuple[Any, Exception | None]]:
        """Send a turn over the stream; over another one where that has broken since the last turn,
        as when its server was started again. Returns where its responses arrive."""
        stale = self._arrived is not None
        arrived = self._open_stream()
        try:
            self._client.async_stream_infer("llava_stream", **request)
        except InferenceServerException:
            if not stale:
                raise
            self._break_stream()
            arrived = self._open_stream()
            self._client.async_stream_infer("llava_stream", **request)
        return arrived

    def _open_stream(self) -> queue.SimpleQueue[tuple[Any, Exception | None]]:
        if self._arrived is None:
            arrived: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
            self._client.start_stream(lambda result, error: arrived.put((result, error)))
            self._arrived = arrived
        return self._arrived

    def _cancel(self, turn: TurnMessage) -> bool:
        """Cancel a turn that has begun, and read the stream to its answer's end; whether that was
        possible. Breaking the stream off would cancel it later, and cost a new stream."""
        assert self._arrived is not None
        request = cancelling(turn).request(triton, self.parameters)
        try:
            self._client.infer("llava", **request, client_timeout=CANCEL_SECONDS)
            while True:
                result, error = self._arrived.get(timeout=CANCEL_SECONDS)
                if error is not None:
                    return is_of_a_turn(error)
                if delta_of(result).is_final:
                    return True
        except (InferenceServerException, queue.Empty):
            return False

    def _break_stream(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._arrived = None


def is_of_a_turn(error: Exception) -> bool:
    """Whether a stream's error ends a turn, and not the stream."""
    return isinstance(error, InferenceServerException) and error.status() is None


def _connect(address: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(address, channel_args=CHANNEL)
