"""A session that its server does not know any more is resumed from the servers' journal.

Where they keep none, the server says so, and its first word stands.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from dataclasses import replace

from llava_triton.client.async_transport import AsyncTransport
from llava_triton.client.transport import Transport, TurnMessage, resuming
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError


class ResumingTransport(Transport):
    """Sessions over another transport, whose turns bring them back where they are lost."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.tenant)
        self._transport = transport

    def open(self, turn: TurnMessage) -> tuple[int | str, Delta]:
        """Open a session."""
        return self._transport.open(turn)

    def ask(self, turn: TurnMessage) -> Delta:
        """One turn; where its session is lost, once more."""
        try:
            return self._transport.ask(turn)
        except SessionError as error:
            if not _may_be_resumed(turn, error):
                raise
            lost = error
        try:
            return self._transport.ask(_again(turn))
        except SessionError as error:
            raise _told(lost, error) from error

    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        """Pieces of the answer. A session that is not known is told so before the first one."""
        return self._stream(turn, self._transport.stream(turn))

    def _stream(
        self, turn: TurnMessage, first: Generator[Delta, None, None]
    ) -> Generator[Delta, None, None]:
        try:
            with closing(first) as deltas:
                yield from deltas
            return
        except SessionError as error:
            if not _may_be_resumed(turn, error):
                raise
            lost = error
        try:
            with closing(self._transport.stream(_again(turn))) as deltas:
                yield from deltas
        except SessionError as error:
            raise _told(lost, error) from error

    def another(self) -> ResumingTransport:
        """A connection like this one."""
        return ResumingTransport(self._transport.another())

    def fork(self, source: int | str, session_id: int | str | None) -> tuple[Transport, int | str]:
        """Fork a session; where it is lost, bring it back first."""
        try:
            return super().fork(source, session_id)
        except SessionError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            lost = error
        try:
            with closing(self._transport.another()) as other:  # this one may be closed
                other.ask(resuming(source))
        except SessionError as error:
            raise _told(lost, error) from error
        return super().fork(source, session_id)

    def stop_answer(self, session_id: int | str) -> Delta:
        """End the session's running answer; a session that is lost gives none."""
        return self._transport.stop_answer(session_id)

    def close(self) -> None:
        """Let the connection go."""
        self._transport.close()


class AsyncResumingTransport(AsyncTransport):
    """As `ResumingTransport`, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
        super().__init__(transport.tenant)
        self._transport = transport

    async def open(self, turn: TurnMessage) -> tuple[int | str, Delta]:
        """Open a session."""
        return await self._transport.open(turn)

    async def ask(self, turn: TurnMessage) -> Delta:
        """One turn; where its session is lost, once more."""
        try:
            return await self._transport.ask(turn)
        except SessionError as error:
            if not _may_be_resumed(turn, error):
                raise
            lost = error
        try:
            return await self._transport.ask(_again(turn))
        except SessionError as error:
            raise _told(lost, error) from error

    async def stream(self, turn: TurnMessage) -> AsyncGenerator[Delta, None]:
        """Pieces of the answer. A session that is not known is told so before the first one."""
        try:
            async with aclosing(self._transport.stream(turn)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        except SessionError as error:
            if not _may_be_resumed(turn, error):
                raise
            lost = error
        try:
            async with aclosing(self._transport.stream(_again(turn))) as deltas:
                async for delta in deltas:
                    yield delta
        except SessionError as error:
            raise _told(lost, error) from error

    def another(self) -> AsyncResumingTransport:
        """A connection like this one."""
        return AsyncResumingTransport(self._transport.another())

    async def fork(
        self, source: int | str, session_id: int | str | None
    ) -> tuple[AsyncTransport, int | str]:
        """Fork a session; where it is lost, bring it back first."""
        try:
            return await super().fork(source, session_id)
        except SessionError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            lost = error
        other = self._transport.another()  # this one may be closed
        try:
            await other.ask(resuming(source))
        except SessionError as error:
            raise _told(lost, error) from error
        finally:
            await other.close()
        return await super().fork(source, session_id)

    async def stop_answer(self, session_id: int | str) -> Delta:
        """End the session's running answer; a session that is lost gives none."""
        return await self._transport.stop_answer(session_id)

    async def close(self) -> None:
        """Let the connection go."""
        await self._transport.close()


def _may_be_resumed(turn: TurnMessage, error: SessionError) -> bool:
    return error.code is ErrorCode.NOT_FOUND and not turn.start


def _again(turn: TurnMessage) -> TurnMessage:
    return replace(turn, start=True, operation=replace(turn.operation, resume=True))


def _told(lost: SessionError, error: SessionError) -> SessionError:
    """What the caller hears: that the session is not known, unless there is more to say."""
    says_more = error.code is not ErrorCode.NOT_FOUND or "journal" in error.sentence
    return error if says_more else lost
