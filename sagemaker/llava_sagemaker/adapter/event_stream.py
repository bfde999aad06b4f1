"""A streamed answer as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llava_sagemaker.adapter.errors import as_adapter_error
from llava_sagemaker.adapter.invocation import AnswerFormat
from llava_sagemaker.adapter.remembered import SessionTurn
from llava_triton.contract.delta import Delta

SILENCE_SECONDS = 300.0
"""An answer may pause so long: a turn of a session waits for the one before it."""


class EventStream(StreamingResponse):
    """The HTTP answer of a streamed invocation. Left early by its client, it cancels the turn.

    Args:
        written: how to write the answer.
        session_turn: is told its whole text, once it is complete.
        first: its first piece.
        pieces: the others.
        headers: of the answer.
        ended: is told `ok`, `disconnected` or an error's code, once, whatever happens.
    """

    def __init__(
        self,
        written: AnswerFormat,
        session_turn: SessionTurn | None,
        first: Delta,
        pieces: AsyncGenerator[Delta, None],
        headers: dict[str, str],
        ended: Callable[[str], None],
    ) -> None:
        super().__init__(self._events(first), headers=headers, media_type="text/event-stream")
        # Not the invocation: its turn holds pictures, and the answer may take long.
        self._written = written
        self._session_turn = session_turn
        self._pieces = pieces
        self._ended = ended
        self._outcome = "disconnected"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()
            self._ended(self._outcome)

    async def _events(self, piece: Delta) -> AsyncIterator[bytes]:
        written, text = self._written, [piece.text]
        try:
            while not piece.is_final:
                if events := written.piece(piece):
                    yield events
                async with asyncio.timeout(SILENCE_SECONDS):
                    piece = await anext(self._pieces)
                text.append(piece.text)
            # Before the client has the last piece: its next turn may follow at once.
            if self._session_turn is not None:
                self._session_turn.completed("".join(text))
            self._outcome = "ok"
            if events := written.piece(piece):
                yield events
            if events := written.end(piece):
                yield events
        except Exception as error:
            self._outcome, told = self._failure(error)
            yield told

    def _failure(self, error: Exception) -> tuple[str, bytes]:
        """Its code, and the events that tell it. (No name of the frame that an error has passed
        may hold it: the two would stay until the garbage collector came.)"""
        failed = as_adapter_error(error)
        return failed.code, self._written.failure(failed)
