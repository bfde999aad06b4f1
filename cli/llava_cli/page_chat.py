"""What one open page shows: its chat, turn by turn, as a list of messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from llava_cli.conversation import Chat
from llava_cli.errors import CommandError
from llava_cli.open_chat import open_chat
from llava_cli.terminal import read_picture
from llava_triton.client import SessionError

Message: TypeAlias = dict[str, Any]
"""`role` and `content`: a text, or `{"path": FILE}`."""
Result = TypeVar("Result")
STOP_SECONDS = 5.0
"""So long a running answer may take to stop: until its next piece."""
BUSY = "an answer is on its way; stop it first"


class PageChat:
    """A chat behind a page, of which several handlers may be called at a time.

    Args:
        url: see `open_chat`.
    """

    def __init__(self, url: str) -> None:
        self.closed = False
        """Nobody is to be shown any more of it."""
        self._chat: Chat = open_chat(url)
        self._files: list[Sequence[str]] = []
        """Of the pictures of every turn."""
        self._stop = threading.Event()
        self._busy = threading.Lock()
        # Triton's HTTP client belongs to the thread that uses it first.
        self._thread = ThreadPoolExecutor(1)

    def ask(self, text: str, files: Sequence[str]) -> Iterator[list[Message]]:
        """The page's messages, again and again while the answer comes.

        Args:
            text: the question.
            files: pictures, by their paths.

        Raises:
            SessionError, CommandError: the turn was refused, or the question is empty; the chat is
                as it was.
        """

        def pieces() -> Generator[str, None, None]:
            return self._chat.ask(text, [read_picture(file) for file in files])

        text = _question_in(text)
        return self._answered(len(self._chat.turns), text, files, pieces)

    def again(self) -> Iterator[list[Message]]:
        """As `ask`: another answer to the last question."""
        last = len(self._chat.turns) - 1
        if last < 0:
            raise CommandError("there is no answer yet; ask something first")
        turn, files = self._chat.turns[last], self._files[last]
        return self._answered(last, turn.text, files, self._chat.again)

    def ask_instead(self, message: int, text: str) -> Iterator[list[Message]]:
        """As `ask`: another question in the place of one, with its pictures; what came after it is
        forgotten.

        Args:
            message: which of the page's messages was changed.
            text: the new question.
        """
        text = _question_in(text)  # before what came after it is forgotten
        if self._busy.locked():
            raise CommandError(BUSY)
        turn = self._turn_of(message)
        # The files may be gone by now: the chat has what was in them.
        files, pictures = self._files[turn], self._chat.turns[turn].pictures
        self._on_thread(self._chat.rewind, turn)
        del self._files[turn:]
        return self._answered(turn, text, files, lambda: self._chat.ask(text, pictures))

    def stop(self) -> None:
        """Stop the answer that comes, if one does; what it has said is kept."""
        self._stop.set()

    def close(self) -> None:
        """End the chat, and the answer that comes. Twice does no harm."""
        self.closed = True
        self._stop.set()
        if self._busy.acquire(timeout=STOP_SECONDS):
            self._busy.release()
        self._thread.submit(self._chat.close)

    def messages(self, turns: int | None = None) -> list[Message]:
        """Those of the first turns; by default of all."""
        return [message for _, message in self._numbered(turns)]

    def _answered(
        self,
        place: int,
        text: str,
        files: Sequence[str],
        start: Callable[[], Generator[str, None, None]],
    ) -> Iterator[list[Message]]:
        if not self._busy.acquire(blocking=False):
            raise CommandError(BUSY)
        try:
            self._stop.clear()
            shown = [*self.messages(place), *_question(text, files)]
            yield shown
            said = ""
            pieces = start()
            try:
                while not self._stop.is_set():
                    piece = self._on_thread(next, pieces, None)
                    if piece is None:
                        break
                    said += piece
                    yield [*shown, _message("assistant", said)]
            finally:
                self._on_thread(pieces.close)
                if len(self._chat.turns) > place:
                    self._files[place:] = [files]
            yield self.messages()
        finally:
            self._busy.release()

    def _on_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        return self._thread.submit(call, *arguments).result()

    def _numbered(self, turns: int | None) -> Iterator[tuple[int, Message]]:
        """The messages, and the number of the turn of each."""
        for number, turn in enumerate(self._chat.turns[:turns]):
            for message in _question(turn.text, self._files[number]):
                yield number, message
            yield number, _message("assistant", f"{turn.answer}\n\n{turn.cost or 'stopped'}")

    def _turn_of(self, message: int) -> int:
        return [number for number, _ in self._numbered(None)][message]


def _question_in(text: str) -> str:
    if question := text.strip():
        return question
    raise CommandError("ask something about the picture: the question is empty")


def _question(text: str, files: Sequence[str]) -> list[Message]:
    return [*(_message("user", {"path": file}) for file in files), _message("user", text)]


def _message(role: str, content: str | dict[str, str]) -> Message:
    return {"role": role, "content": content}


def sentence(error: SessionError | CommandError) -> str:
    """What a person is told."""
    return error.sentence if isinstance(error, SessionError) else str(error)
