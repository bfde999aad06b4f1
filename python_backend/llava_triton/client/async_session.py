"""A session with a picture, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from typing import Any

from llava_triton.client.answer import Answer, AnswerParts, StopOnce, whole_answer
from llava_triton.client.async_transport import (
    LET_GO_SECONDS,
    AsyncTransport,
    ThreadedTransport,
)
from llava_triton.client.opening import Address, asking, opening_turn
from llava_triton.client.pictures import Picture, Video, encoded_pictures, encoded_video, shown
from llava_triton.client.resuming import AsyncResumingTransport
from llava_triton.client.transport import TurnMessage, regenerating, rewinding
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.sampling_parameters import Truncation


class AsyncAnswerStream:
    """An answer on its way, as `AnswerStream`: iterate with `async for`, then read `answer`.

    To leave it early, `aclose` it or use it in an `async with` block: that cancels the turn. (A
    plain `break` leaves it running until the next turn.) To end it and keep what was said, `stop`
    it and read on.

    Args:
        deltas: the pieces.
        stop: ends the answer as it is.
    """

    def __init__(
        self, deltas: AsyncGenerator[Delta, None], stop: Callable[[], Coroutine[Any, Any, object]]
    ) -> None:
        self._deltas = deltas
        self._answer: Answer | None = None
        self._stop = stop
        self._stopping = StopOnce(self._tell)
        self._telling: asyncio.Task[object] | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, once every piece has been read.

        Raises:
            RuntimeError: it has not ended yet, or was left early.
        """
        if self._answer is None:
            raise RuntimeError("the answer has not ended; iterate over the stream to its end first")
        return self._answer

    async def stop(self) -> None:
        """End the answer and keep it, as `AnswerStream.stop`.

        Raises:
            SessionError: the server cannot be told.
        """
        self._stopping.ask()
        if self._telling is not None:
            await asyncio.shield(self._telling)

    def _tell(self) -> None:
        self._telling = asyncio.ensure_future(self._stop())

    async def aclose(self) -> None:
        """Cancel the answer, if it has not ended."""
        await self._deltas.aclose()

    async def __aiter__(self) -> AsyncIterator[str]:
        parts = AnswerParts()
        try:
            async for delta in self._deltas:
                parts.add(delta)
                self._stopping.heard(delta)
                self._answer = parts.answer
                if delta.text:
                    yield delta.text
        finally:
            await self.aclose()
            if self._telling is not None:
                with contextlib.suppress(SessionError):  # told to who stopped it
                    await self._telling

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncSession:
    """A conversation whose state stays on the server; make one with `AsyncSession.open`.

        async with await AsyncSession.open("grpc://localhost:8001", image="cat.jpg") as session:
            print((await session.ask("What is in the picture?")).text)
            async for piece in session.stream("And what colour is it?"):
                print(piece, end="", flush=True)

    Lost sessions come back from a journal as for `Session`.

    One turn at a time, in the event loop that opened it. A task that is cancelled while it reads a
    stream cancels its turn. One that is cancelled in `ask` only waits no longer: the turn goes on,
    and counts (`max_seconds` ends it in time). One that is cancelled in `open` or `fork` waits no
    longer either: what it opened is ended in the background, as long as the event loop runs.
    """

    def __init__(self, transport: AsyncTransport, session_id: int | str) -> None:
        self.id = session_id
        self._transport = transport
        self._open = True
        self._stream: AsyncAnswerStream | None = None

    @classmethod
    async def open(
        cls,
        url: str,
        image: Picture | Iterable[Picture] | None = None,
        session_id: int | str | None = None,
        tenant: str | None = None,
        history: Sequence[PastTurn] = (),
        truncation: Truncation | None = None,
        resume: int | str | None = None,
        video: Video | None = None,
        num_frames: int | None = None,
    ) -> AsyncSession:
        """Open a session; arguments and errors as for `Session.open`.

        Where the servers keep a journal, a lost session comes back by itself. A replay is not
        offered here: without a journal, `history` opens a lost session again.
        """
        address = Address.of(url)
        shows = shown(image, video, num_frames)
        turn = opening_turn(address, shows, session_id, history, truncation, resume)
        return await _opened_or_ended(cls._opened(connect(address, tenant), turn))

    @classmethod
    async def _opened(cls, transport: AsyncTransport, turn: TurnMessage) -> AsyncSession:
        try:
            opened, _ = await transport.open(turn)
        except BaseException:
            await transport.close()
            raise
        return cls(transport, opened)

    async def ask(
        self,
        text: str,
        image: Picture | Iterable[Picture] | None = None,
        video: Video | None = None,
        num_frames: int | None = None,
        image_positions: Sequence[int] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Ask, and wait for the whole answer; arguments and errors as for `Session.ask`."""
        return await self._send(
            asking(self.id, text, image, video, num_frames, image_positions, sampling)
        )

    def stream(
        self,
        text: str,
        image: Picture | Iterable[Picture] | None = None,
        video: Video | None = None,
        num_frames: int | None = None,
        image_positions: Sequence[int] | None = None,
        **sampling: Any,
    ) -> AsyncAnswerStream:
        """Ask, and get the answer piece by piece; arguments as for `Session.ask`.

        Errors come from iterating: SessionError, the session is then as it was before the turn.
        """
        turn = asking(self.id, text, image, video, num_frames, image_positions, sampling)
        return self._begin_stream(turn)

    async def add_image(self, image: Picture | Iterable[Picture]) -> Answer:
        """Show more pictures without asking; the next question is about them too."""
        return await self._send(TurnMessage(self.id, images=encoded_pictures(image)))

    async def add_video(self, video: Video, num_frames: int | None = None) -> Answer:
        """Show a video without asking, or the next frames of a camera, as a list of pictures.

        What came before is not computed again.
        """
        return await self._send(TurnMessage(self.id, images=encoded_video(video, num_frames)))

    async def regenerate(self, **sampling: Any) -> Answer:
        """Answer the last question again; as `Session.regenerate`."""
        return await self._send(regenerating(self.id, sampling))

    def stream_again(self, **sampling: Any) -> AsyncAnswerStream:
        """As `regenerate`, piece by piece; left early, the last answer is there as before."""
        return self._begin_stream(regenerating(self.id, sampling))

    async def rewind(self, turns: int) -> Answer:
        """Keep the first `turns` completed turns; as `Session.rewind`."""
        return await self._send(rewinding(self.id, turns))

    async def fork(self, session_id: int | str | None = None) -> AsyncSession:
        """Open another session that has all of this one so far; as `Session.fork`."""
        await self._leave_stream()
        return await _opened_or_ended(self._forked(session_id))

    async def _forked(self, session_id: int | str | None) -> AsyncSession:
        return AsyncSession(*await self._transport.fork(self.id, session_id))

    async def close(self) -> None:
        """End the session; the server frees all it held. Closing twice is fine."""
        try:
            if self._open:
                self._open = False
                # It may have expired, or the server may be gone: then it is closed already.
                with contextlib.suppress(SessionError, TimeoutError):
                    async with asyncio.timeout(LET_GO_SECONDS):
                        await self._leave_stream()
                        await self._transport.ask(TurnMessage(self.id, end=True))
        finally:
            await self._transport.close()

    def _begin_stream(self, turn: TurnMessage) -> AsyncAnswerStream:
        deltas = self._streamed(turn, self._stream)
        self._stream = AsyncAnswerStream(deltas, lambda: self._transport.stop_answer(self.id))
        return self._stream

    async def _send(self, turn: TurnMessage) -> Answer:
        await self._leave_stream()
        began = time.perf_counter()
        asking = asyncio.ensure_future(self._transport.ask(turn))
        # Nobody may be left to hear of its failure.
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Breaking off the call would not end the turn, but may end the session.
        final = await asyncio.shield(asking)
        return whole_answer(final, final.first_token_ms / 1000.0, time.perf_counter() - began)

    async def _streamed(
        self, turn: TurnMessage, before: AsyncAnswerStream | None
    ) -> AsyncGenerator[Delta, None]:
        if before is not None:
            await before.aclose()
        async with contextlib.aclosing(self._transport.stream(turn)) as deltas:
            async for delta in deltas:
                yield delta

    async def _leave_stream(self) -> None:
        """A new turn ends the one whose answer nobody reads any more."""
        if self._stream is not None:
            await self._stream.aclose()
            self._stream = None

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


_ENDING: set[asyncio.Task[None]] = set()
"""Tasks that end what nobody waits for. An event loop keeps none alive by itself."""


async def _opened_or_ended(opening: Coroutine[Any, Any, AsyncSession]) -> AsyncSession:
    """A session. Cancelled, it is opened all the same, and then ended: a server does not stop
    opening a session because its client has gone, and would keep it until it expires."""
    task = asyncio.ensure_future(opening)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        ending = asyncio.ensure_future(_end(task))
        _ENDING.add(ending)
        ending.add_done_callback(_ENDING.discard)
        raise


async def _end(opening: asyncio.Task[AsyncSession]) -> None:
    with contextlib.suppress(SessionError):  # it was not opened
        session = await opening
        await session.close()


def connect(address: Address, tenant: str | None) -> AsyncTransport:
    """A connection, which is the caller's to close."""
    if address.scheme == "grpc":
        from llava_triton.client.async_grpc import AsyncGrpcTransport

        return AsyncResumingTransport(AsyncGrpcTransport(address.place, tenant))
    if address.scheme == "http":
        from llava_triton.client.async_http import AsyncHttpTransport

        return AsyncResumingTransport(AsyncHttpTransport(address.place, tenant))
    from llava_triton.client.sagemaker import SageMakerTransport

    return ThreadedTransport(SageMakerTransport(address.place, **address.options, tenant=tenant))
