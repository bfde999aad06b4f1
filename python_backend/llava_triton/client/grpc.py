"""gRPC: whole answers through `llava`, streamed ones through `llava_stream`."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from llava_triton.client.transport import Transport, TurnMessage, delta_of, session_error
from llava_triton.delta import Delta


class GrpcTransport(Transport):
    """A connection to `host:port`, with one gRPC stream that all streamed turns share."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = triton.InferenceServerClient(address)
        self._arrived: queue.SimpleQueue[tuple[Any, Exception | None]] | None = None

    def ask(self, turn: TurnMessage) -> Delta:
        """One call, one answer."""
        try:
            result = self._client.infer(
                "llava",
                turn.inputs(triton),
                sequence_id=turn.session_id,
                sequence_start=turn.start,
                sequence_end=turn.end,
            )
        except InferenceServerException as error:
            raise session_error(error, self._address) from error
        return delta_of(result)

    def stream(self, turn: TurnMessage) -> Iterator[Delta]:
        """Pieces as they come; left early, the gRPC stream breaks off and so cancels the turn."""
        ended = False
        try:
            arrived = self._open_stream()
            self._client.async_stream_infer(
                "llava_stream",
                turn.inputs(triton),
                sequence_id=turn.session_id,
                sequence_start=turn.start,
                sequence_end=turn.end,
            )
            while not ended:
                result, error = arrived.get()
                if error is not None:
                    raise error
                delta = delta_of(result)
                ended = delta.is_final
                yield delta
        except InferenceServerException as error:
            raise session_error(error, self._address) from error
        finally:
            # After an error too: it may have been the stream's own, which is of no use then.
            if not ended:
                self._break_stream()

    def close(self) -> None:
        """Let the stream and the connection go."""
        if self._arrived is not None:
            self._client.stop_stream()
        self._client.close()

    def _open_stream(self) -> queue.SimpleQueue[tuple[Any, Exception | None]]:
        if self._arrived is None:
            arrived: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
            self._client.start_stream(lambda result, error: arrived.put((result, error)))
            self._arrived = arrived
        return self._arrived

    def _break_stream(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._arrived = None
