"""What a session answers: whole, or piece by piece."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta


@dataclass(frozen=True)
class Answer(Delta):
    """A whole answer, with what it cost."""

    first_token_seconds: float
    """Streamed: from sending the turn to its first token, as seen here. Whole: from the turn's
    arrival in the engine to its first token, as the server says."""
    seconds: float
    """From sending the turn to the end of its answer, as seen here."""

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens that were computed for this answer."""
        return self.num_input_tokens - self.num_cached_tokens


class StopOnce:
    """When to tell the server that an answer shall end: once, and not before it has begun, because
    the server would know of nothing to stop.

    Args:
        tell: tells it.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._wanted = self._going = self._told = False

    def ask(self) -> None:
        """It shall end."""
        with self._lock:
            self._wanted = True
        self._tell_if_due()

    def heard(self, delta: Delta) -> None:
        """A piece has come."""
        with self._lock:
            self._going = not delta.is_final
        self._tell_if_due()

    def _tell_if_due(self) -> None:
        with self._lock:
            due = self._wanted and self._going and not self._told
            self._told = self._told or due
        if due:
            self._tell()


class AnswerParts:
    """The pieces of an answer as they come; made when its turn is sent."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        """The whole answer, once its last piece has come."""
        self._sent_at = time.perf_counter()
        self._pieces: list[Delta] = []
        self._first: float | None = None

    def add(self, delta: Delta) -> None:
        """Take the next piece, now."""
        seconds = time.perf_counter() - self._sent_at
        if self._first is None and (delta.num_output_tokens or delta.is_final):
            self._first = seconds
        self._pieces.append(delta)
        if delta.is_final:
            self.answer = whole_answer(ANSWER.joined(self._pieces), self._first or seconds, seconds)


class AnswerStream:
    """An answer on its way: iterate over its pieces, then read `answer`.

    The turn is sent when the iteration begins. Leaving it early (`break`, `close`, the end of a
    `with` block) cancels the turn: the session is back at its last completed one. To end it and
    keep what was said, `stop` it and read on.

    Args:
        deltas: the pieces.
        stop: ends the answer as it is.
    """

    def __init__(self, deltas: Iterator[Delta], stop: Callable[[], object]) -> None:
        self._deltas = deltas
        self._answer: Answer | None = None
        self._stopping = StopOnce(stop)

    @property
    def answer(self) -> Answer:
        """The whole answer, once every piece has been read.

        Raises:
            RuntimeError: it has not ended yet, or was left early.
        """
        if self._answer is None:
            raise RuntimeError("the answer has not ended; iterate over the stream to its end first")
        return self._answer

    def stop(self) -> None:
        """End the answer and keep it: what was said so far is a completed turn of the session.

        Read on: the last pieces follow, and then the iteration ends, with the finish reason
        `stopped`. For any thread. An answer that has not begun is stopped when it begins, one that
        has ended stays as it is.

        Raises:
            SessionError: the server cannot be told.
        """
        self._stopping.ask()

    def close(self) -> None:
        """Cancel the answer, if it has not ended."""
        close = getattr(self._deltas, "close", None)
        if close is not None:
            close()

    def __iter__(self) -> Iterator[str]:
        parts = AnswerParts()
        try:
            for delta in self._deltas:
                parts.add(delta)
                self._stopping.heard(delta)
                self._answer = parts.answer
                if delta.text:
                    yield delta.text
        finally:
            self.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole_answer(final: Delta, first_token_seconds: float, seconds: float) -> Answer:
    """An answer from its last piece, which holds the whole text and the final numbers."""
    return Answer(**vars(final), first_token_seconds=first_token_seconds, seconds=seconds)
