"""A turn: what a client asked, how far its answer is, and what it cost."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from llava_triton.delta import Delta
from llava_triton.detokenizer import Detokenizer
from llava_triton.engine.session import Session, SessionId
from llava_triton.errors import SessionError
from llava_triton.sampling import Sampler, SamplingParameters

Listener = Callable[[Delta | SessionError], None]
"""Called on the engine's thread: pieces of the answer in order, the last one final, or an error."""


@dataclass(frozen=True, eq=False)  # tensors do not compare
class TurnRequest:
    """One turn of one session, checked as far as it can be without the session."""

    session_id: SessionId
    start: bool = False
    """Open the session; an open one of this ID is closed first."""
    end: bool = False
    """Close the session when the turn has been answered."""
    text: str | None = None
    image_features: Tensor | None = None
    """[N, T, D], any float dtype and device."""
    sampling: SamplingParameters = field(default_factory=SamplingParameters)


@dataclass(eq=False)
class Turn:
    """A turn on its way through the engine."""

    request: TurnRequest
    listener: Listener
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived_at: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class RunningTurn:
    """A turn that is being computed: the prompt first, then one token at a time."""

    turn: Turn
    session: Session
    prompt: list[int]
    cached_tokens: int
    """How many prompt tokens the device remembered: they are not computed again."""
    features_before: int
    """Entries of the session's `image_features` when the turn began."""
    images: int
    """Images in the message this turn completes, pending ones included."""
    max_tokens: int
    """0 where the turn has no text: the prompt is computed and nothing is sampled."""
    sampler: Sampler
    detokenizer: Detokenizer
    answer: list[int] = field(default_factory=list)
    """Token IDs generated, the end-of-sequence token excluded."""
    first_token_at: float | None = None

    @property
    def uncomputed(self) -> list[int]:
        """Token IDs of prompt and answer that are not on the device yet."""
        done = len(self.session.cached_ids)
        if done >= len(self.prompt):
            return self.answer[done - len(self.prompt) :]
        return [*self.prompt[done:], *self.answer]

    def delta(self, text: str, finish_reason: str) -> Delta:
        """A piece of the answer with the turn's numbers as they are now."""
        first = self.first_token_at
        return Delta(
            text=text,
            finish_reason=finish_reason,  # type: ignore[arg-type]
            num_input_tokens=len(self.prompt),
            num_output_tokens=len(self.answer),
            num_cached_tokens=self.cached_tokens,
            first_token_ms=0.0 if first is None else (first - self.turn.arrived_at) * 1000.0,
        )


@dataclass
class Statistics:
    """Counts since the engine started, and how many sessions and turns there are now."""

    sessions_opened: int = 0
    sessions_closed: int = 0
    sessions_expired: int = 0
    sessions_open: int = 0
    turns_completed: int = 0
    turns_failed: int = 0
    turns_cancelled: int = 0
    turns_in_flight: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    answer_tokens: int = 0
