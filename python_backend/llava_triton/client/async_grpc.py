"""gRPC on asyncio: whole answers through `llava`, streamed ones through `llava_stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from llava_triton.client.async_transport import LET_GO_SECONDS, AsyncTransport, each
from llava_triton.client.grpc import CHANNEL, is_of_a_turn
from llava_triton.client.transport import TurnMessage, cancelling, delta_of, named, session_error
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
        """Pieces as they come; left early, the turn is cancelled."""
        turn = named(turn)
        begun = ended = False
        reading: asyncio.Future[Any] | None = None
        try:
            if self._responses is None:
                self._turns = asyncio.Queue()
                self._responses = self._client.stream_infer(each(self._turns))
            request = turn.request(triton, self.parameters)
            self._turns.put_nowait({"model_name": "llava_stream", **request})
            while not ended:
                reading = asyncio.ensure_future(anext(self._responses))
                # Who waits for it may be cancelled, and the stream with it.
                result, error = await asyncio.shield(reading)
                reading = None
                if error is not None:
                    ended = is_of_a_turn(error)
                    raise error
                begun = True
                delta = delta_of(result)
                ended = delta.is_final
                yield delta
        except (InferenceServerException, grpc.RpcError, StopAsyncIteration) as error:
            if not ended:  # the stream's own: it is of no use any more
                ended = True
                self._break_stream()
            raise self._told(error) from error
        finally:
            if not ended:
                await self._leave(turn, reading, begun)

    async def _leave(
        self, turn: TurnMessage, reading: asyncio.Future[Any] | None, begun: bool
    ) -> None:
        """Cancel a turn; the stream breaks off only where it does not come to the answer's end."""
        cancelled = False
        try:
            async with asyncio.timeout(LET_GO_SECONDS):
                cancelled = await self._cancel(turn, reading, begun)
        except (InferenceServerException, grpc.RpcError, StopAsyncIteration, TimeoutError):
            pass  # the server has gone, or hangs
        finally:
            if not cancelled:
                self._break_stream()
                if reading is not None:
                    reading.cancel()

    async def _cancel(
        self, turn: TurnMessage, reading: asyncio.Future[Any] | None, begun: bool
    ) -> bool:
        """Cancel a turn and read the stream to its answer's end; whether it goes on behind it."""
        if self._responses is None:
            return False
        await self._client.infer("llava", **cancelling(turn).request(triton, self.parameters))
        while True:
            result, error = await (reading or anext(self._responses))
            reading = None
            if error is not None:
                return is_of_a_turn(error)
            if delta_of(result).is_final:
                return True
            if not begun:  # it was on its way to the engine, which did not know it
                begun = True
                await self._client.infer(
                    "llava", **cancelling(turn).request(triton, self.parameters)
                )

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
