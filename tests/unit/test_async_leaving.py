"""What a client of `AsyncSession` leaves behind that is cancelled, or that no server answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import tritonclient.grpc.aio

from llava_triton.client import AsyncSession, async_grpc, async_session
from llava_triton.client.async_grpc import AsyncGrpcTransport
from llava_triton.client.async_transport import AsyncTransport
from llava_triton.client.transport import TurnMessage
from llava_triton.contract.delta import Delta

PREFILLED = Delta("", "prefilled", 0, 0, 0, 0.0)
WITHIN_SECONDS = 20.0


class SlowServer:
    """Opens sessions when it may; says nothing to an END where it is `silent`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.may_open = asyncio.Event()
        self.closed = asyncio.Event()
        """A connection is."""
        self.open: set[int | str] = set()
        self.silent = False

    async def answer(self, turn: TurnMessage) -> Delta:
        if turn.end:
            if self.silent:
                await asyncio.Event().wait()
            self.open.remove(turn.session_id)
        elif turn.start:
            self.asked.set()
            await self.may_open.wait()
            self.open.add(turn.session_id)
        return PREFILLED


class ToSlowServer(AsyncTransport):
    def __init__(self, server: SlowServer) -> None:
        super().__init__()
        self.server = server

    def another(self) -> AsyncTransport:
        return ToSlowServer(self.server)

    async def ask(self, turn: TurnMessage) -> Delta:
        # As a server does: what it has begun it does not stop because its client goes.
        return await asyncio.shield(asyncio.ensure_future(self.server.answer(turn)))

    async def stream(self, turn: TurnMessage) -> AsyncGenerator[Delta, None]:
        yield await self.ask(turn)

    async def close(self) -> None:
        self.server.closed.set()


def with_slow_server(
    talk: Callable[[SlowServer], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        server = SlowServer()
        monkeypatch.setattr(async_session, "connect", lambda *_: ToSlowServer(server))
        async with asyncio.timeout(WITHIN_SECONDS):
            await talk(server)

    asyncio.run(run())


async def cancelled(opening: Coroutine[Any, Any, AsyncSession], server: SlowServer) -> None:
    task = asyncio.create_task(opening)
    await server.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_opening_that_is_cancelled_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(server: SlowServer) -> None:
        await cancelled(AsyncSession.open("grpc://slow:1"), server)
        assert not server.closed.is_set()
        server.may_open.set()
        await server.closed.wait()
        assert server.open == set()

    with_slow_server(talk, monkeypatch)


def test_a_fork_that_is_cancelled_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(server: SlowServer) -> None:
        server.may_open.set()
        session = await AsyncSession.open("grpc://slow:1", session_id="first")
        server.may_open.clear()
        server.asked.clear()
        await cancelled(session.fork("second"), server)
        assert not server.closed.is_set()
        server.may_open.set()
        await server.closed.wait()
        assert server.open == {"first"}

    with_slow_server(talk, monkeypatch)


def test_closing_waits_for_a_silent_server_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(server: SlowServer) -> None:
        server.may_open.set()
        session = await AsyncSession.open("grpc://slow:1")
        server.silent = True
        await session.close()
        assert server.closed.is_set()

    monkeypatch.setattr(async_session, "LET_GO_SECONDS", 0.05)
    with_slow_server(talk, monkeypatch)


class Silence:
    """A gRPC stream on which nothing comes."""

    def __init__(self) -> None:
        self.read = asyncio.Event()
        self.broken = False

    async def __anext__(self) -> Any:
        self.read.set()
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.broken = True


def test_a_stream_is_left_though_nothing_comes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> None:
        transport = AsyncGrpcTransport("localhost:1")
        responses = Silence()
        client = tritonclient.grpc.aio.InferenceServerClient
        monkeypatch.setattr(client, "stream_infer", lambda _, turns: responses)
        pieces = transport.stream(TurnMessage("a", text="?"))
        reading = asyncio.ensure_future(anext(pieces))
        await responses.read.wait()
        reading.cancel()
        async with asyncio.timeout(WITHIN_SECONDS):
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert responses.broken
        await transport.close()

    monkeypatch.setattr(async_grpc, "LET_GO_SECONDS", 0.05)
    asyncio.run(talk())
