"""A piece of an answer, on its way from the engine to a client."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["", "stop", "length", "prefilled", "closed"]
"""Why an answer is over: `stop` (end of sequence or a stop string), `length` (max_tokens or the
model's context), `prefilled` (a turn without text: nothing was asked), `closed` (END without text).
Empty while the answer goes on."""


@dataclass(frozen=True)
class Delta:
    """New text of an answer, with the turn's numbers as they are by now."""

    text: str
    finish_reason: FinishReason
    num_input_tokens: int
    """Prompt tokens of this turn: the whole conversation before the answer, images included."""
    num_output_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were not computed again."""
    first_token_ms: float
    """Milliseconds from the turn's arrival in the engine to its first token; 0 before it."""

    @property
    def is_final(self) -> bool:
        """Whether this is the answer's last piece."""
        return self.finish_reason != ""

    def with_text(self, text: str) -> Delta:
        """The same numbers with another text."""
        return replace(self, text=text)
