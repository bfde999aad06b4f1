"""A chat as a person holds it, over any of the ways to a server.

Turns can be stopped, asked again and changed. `Chat` keeps what was said and shown, so a server
that has forgotten it can be told again; how that is done is `Chat._forget`'s business alone.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

AGAIN = {"temperature": 0.7}
"""How an answer is asked for again: the likeliest one would be the same."""


@dataclass(frozen=True)
class Cost:
    """What an answer took."""

    first_token_seconds: float
    """From sending the turn to its first token, as seen here."""
    num_input_tokens: int
    """Tokens of the prompt."""
    num_cached_tokens: int
    """Those of them that were not computed again."""
    num_output_tokens: int

    def __str__(self) -> str:
        reused = f"{self.num_cached_tokens} of {self.num_input_tokens} prompt tokens reused"
        first = f"first token after {1000 * self.first_token_seconds:.0f} ms"
        return f"{first}, {reused}, {self.num_output_tokens} tokens"


@dataclass
class ChatTurn:
    """A question, and what was said to it."""

    text: str
    pictures: Sequence[bytes] = ()
    """Encoded files that came with it."""
    answer: str = ""
    cost: Cost | None = None
    """None while the answer runs, and where it was stopped."""


@dataclass
class Chat(ABC):
    """What was said and shown, and the way to go on. For one thread at a time."""

    turns: list[ChatTurn] = field(default_factory=list)

    def ask(
        self, text: str, pictures: Sequence[bytes] = (), **sampling: Any
    ) -> Generator[str, None, None]:
        """The answer, piece by piece; the turn then is the last of `turns`.

        Closing the generator stops the answer. What it had said by then is kept: the turn stands,
        with that as its answer.

        Args:
            text: the question.
            pictures: encoded files.
            sampling: max_tokens, temperature, seed ...

        Raises:
            SessionError: the turn was refused or has failed; `turns` is as it was.
        """
        turn = ChatTurn(text, pictures)
        try:
            with closing(self._pieces(turn, sampling)) as pieces:
                for piece in pieces:
                    turn.answer += piece
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            # Leaving a stream undoes the turn at the server, but not for the person who read it.
            # A whole answer that nobody waits for is a turn at the server, but not here.
            self._forget()
            if turn.answer:
                self.turns.append(turn)
            raise
        self.turns.append(turn)

    def again(self) -> Generator[str, None, None]:
        """Another answer to the last question, in the place of the one it has; as `ask`."""
        number, last = len(self.turns), self.turns[-1]
        try:
            self.rewind(number - 1)
            yield from self.ask(last.text, last.pictures, seed=random.getrandbits(31), **AGAIN)
        except BaseException:  # Ctrl-C too, where it came before the first piece
            if len(self.turns) < number:
                self._forget()
                self.turns.append(last)
            raise

    def rewind(self, turns: int) -> None:
        """Go back to where the chat had so many turns."""
        if turns < len(self.turns):
            self._forget()
            del self.turns[turns:]

    @abstractmethod
    def close(self) -> None:
        """End it at the server too."""

    @abstractmethod
    def _pieces(self, turn: ChatTurn, sampling: dict[str, Any]) -> Generator[str, None, None]:
        """Send a turn; fills in its cost at the end."""

    @abstractmethod
    def _forget(self) -> None:
        """What the server has of this chat is not what was said any more."""
