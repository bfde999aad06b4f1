"""Transports for asyncio: gRPC and HTTP by Triton's own asyncio clients, others on threads."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from typing import Any, TypeVar

from llava_triton.client.transport import (
    Transport,
    TurnMessage,
    forking,
    stopping,
    tenant_parameters,
)
from llava_triton.contract.delta import Delta

Result = TypeVar("Result")
LET_GO_SECONDS = 60.0
"""So long a client that leaves waits for the server's word. A server that says nothing for so long
has gone, or hangs."""


class AsyncTransport(ABC):
    """A way to a server, as `Transport`. Made and used in one event loop."""

    def __init__(self, tenant: str | None = None) -> None:
        self.tenant = tenant
        self.parameters = tenant_parameters(tenant)
        """Of every request."""

    async def open(self, turn: TurnMessage) -> tuple[int | str, Delta]:
        """Send a turn that opens a session; the session's ID and the whole answer."""
        return turn.session_id, await self.ask(turn)

    async def fork(
        self, source: int | str, session_id: int | str | None
    ) -> tuple[AsyncTransport, int | str]:
        """Open a session as a copy of another one; as `Transport.fork`."""
        other = self.another()
        try:
            opened, _ = await other.open(forking(source, session_id))
        except BaseException:
            await other.close()
            raise
        return other, opened

    async def stop_answer(self, session_id: int | str) -> Delta:
        """End a session's running answer as it is; may be called while it is streamed."""
        return await self.ask(stopping(session_id))

    @abstractmethod
    def another(self) -> AsyncTransport:
        """A connection like this one."""

    @abstractmethod
    async def ask(self, turn: TurnMessage) -> Delta:
        """Send a turn; its whole answer as one final piece."""

    @abstractmethod
    def stream(self, turn: TurnMessage) -> AsyncGenerator[Delta, None]:
        """Send a turn at the first `anext`; the pieces of its answer, the last one final.

        Closing the generator early cancels the turn.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let the connection go."""


class ThreadedTransport(AsyncTransport):
    """Any transport, its waiting done by threads.

    A thread cannot be broken off: what is cancelled ends with the next piece of its answer.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__()  # the tenant is the other transport's
        self._transport = transport

    async def open(self, turn: TurnMessage) -> tuple[int | str, Delta]:
        """Open a session."""
        return await _on_a_thread(self._transport.open, turn)

    async def fork(
        self, source: int | str, session_id: int | str | None
    ) -> tuple[AsyncTransport, int | str]:
        """Open a session as a copy of another one."""
        other, opened = await _on_a_thread(self._transport.fork, source, session_id)
        return ThreadedTransport(other), opened

    async def stop_answer(self, session_id: int | str) -> Delta:
        """End a session's running answer as it is."""
        return await _on_a_thread(self._transport.stop_answer, session_id)

    def another(self) -> ThreadedTransport:
        """A connection like this one."""
        return ThreadedTransport(self._transport.another())

    async def ask(self, turn: TurnMessage) -> Delta:
        """Send a turn; its whole answer."""
        return await _on_a_thread(self._transport.ask, turn)

    async def stream(self, turn: TurnMessage) -> AsyncGenerator[Delta, None]:
        """Send a turn; its pieces."""
        deltas = self._transport.stream(turn)
        try:
            while (delta := await _on_a_thread(next, deltas, None)) is not None:
                yield delta
        finally:
            await _on_a_thread(deltas.close)

    async def close(self) -> None:
        """Let the connection go."""
        await _on_a_thread(self._transport.close)


async def _on_a_thread(call: Callable[..., Result], *arguments: Any) -> Result:
    """What a call gives. Cancelled, it waits for the call's end first: what the call uses is not
    for two at a time."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with suppress(Exception):
            await running
        raise


async def each(queue: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    """What is put into a queue, until that is None."""
    while (item := await queue.get()) is not None:
        yield item
