"""gRPC on asyncio: whole answers through `llava`, streamed ones through `llava_stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from llava_triton.client.async_transport import LET_GO_SECONDS, AsyncTransport, each
from llava_triton.client.grpc import CHANNEL
from llava_triton.client.transport import TurnMessage, delta_of, session_error
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError


class AsyncGrpcTransport(AsyncTransport):
    """A connection to `host:port`, with one gRPC stream that all streamed turns share.

    Args:
        address: `host:port`.
        tenant: see `Transport`.
    """

    def __init__(self, address: str, tenant: str | None = None) -> None:
        super().__init__(tenant)
        self._address = address
        self._client = triton.InferenceServerClient(address, channel_args=CHANNEL)
        self._turns: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._responses: Any = None

    def another(self) -> AsyncGrpcTransport:
        """A connection to the same address."""
        return AsyncGrpcTransport(self._address, self.tenant)

    async def ask(self, turn: TurnMessage) -> Delta:
        """One call, one answer."""
        try:
            return delta_of(
                await self._client.infer("llava", **turn.request(triton, self.parameters))
            )
        except InferenceServerException as error:
            raise session_error(error, self._address) from error

    async def stream(self, turn: TurnMessage) -> AsyncGenerator[Delta, None]:
        """Pieces as they come; left early, the gRPC stream breaks off and so cancels the turn."""
        begun = ended = False
        try:
            if self._responses is None:
                self._turns = asyncio.Queue()
                self._responses = self._client.stream_infer(each(self._turns))
            request = turn.request(triton, self.parameters)
            self._turns.put_nowait({"model_name": "llava_stream", **request})
            while not ended:
                result, error = await (anext(self._responses) if begun else self._first())
                begun = True
                if error is not None:
                    raise error
                delta = delta_of(result)
                ended = delta.is_final
                yield delta
        except (InferenceServerException, grpc.RpcError, StopAsyncIteration) as error:
            raise self._told(error) from error
        finally:
            # After an error too: it may have been the stream's own, which is of no use then.
            if not ended:
                self._break_stream()

    async def _first(self) -> Any:
        """A turn's first response, a heartbeat if nothing else.

        Cancelled, it is waited for all the same, for at most LET_GO_SECONDS: where a turn is
        cancelled that Triton has not handed on yet, Triton ends the whole session.
        """
        reading = asyncio.ensure_future(anext(self._responses))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait((reading,), timeout=LET_GO_SECONDS)
            reading.cancel()
            raise

    async def close(self) -> None:
        """Let the stream and the connection go."""
        self._break_stream()
        await self._client.close()

    def _told(self, error: Exception) -> SessionError:
        if isinstance(error, grpc.aio.AioRpcError):
            # As Triton's client words it where it does.
            error = InferenceServerException(error.details(), str(error.code()))
        elif isinstance(error, StopAsyncIteration):
            error = ConnectionError("the stream has ended")
        return session_error(error, self._address)

    def _break_stream(self) -> None:
        self._turns.put_nowait(None)
        if self._responses is not None:
            self._responses.cancel()
            self._responses = None
