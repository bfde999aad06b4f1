"""What the engine counts, for whoever watches it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from llava_triton.engine.image_store import ImageStore
from llava_triton.engine.session_memory import MemoryCounters, SessionMemory

if TYPE_CHECKING:
    from llava_triton.journal.writer import JournalCounters

FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds; upper bounds of the buckets."""
BETWEEN_TOKENS_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
"""Seconds; upper bounds of the buckets."""


@dataclass
class Histogram:
    """Observations, counted in buckets."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets; one more bucket takes what is above."""
    counts: list[int] = field(default_factory=list)
    """Observations of each bucket."""
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """As it is now."""
        return Histogram(self.bounds, list(self.counts), self.sum)


@dataclass
class Statistics(MemoryCounters):
    """Counts since the engine started, and how things stand now."""

    sessions_opened: int = 0
    sessions_closed: int = 0
    """By END, by a START on the same ID, by `close`, by a failed opening, by expiry."""
    sessions_expired: int = 0
    turns_completed: int = 0
    turns_failed: int = 0
    """Refused ones are not among them."""
    turns_cancelled: int = 0
    turns_refused: int = 0
    """Before anything was computed: bad ones, and those the engine had no room for."""
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    answer_tokens: int = 0
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    """From a turn's arrival to its first token."""
    between_tokens_seconds: Histogram = field(
        default_factory=lambda: Histogram(BETWEEN_TOKENS_BOUNDS)
    )

    # How things stand now.
    sessions_open: int = 0
    sessions_active: int = 0
    """With a turn that runs or waits."""
    turns_in_flight: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_shared: int = 0
    """Held by more than one session."""
    host_bytes: int = 0
    """Keys and values in host memory."""
    images: int = 0
    """Different pictures of the open sessions."""

    # Counts of the pictures' memory.
    image_hits: int = 0
    """Pictures that were there already when a session brought them."""
    images_evicted: int = 0
    """Pictures whose features went to host memory."""
    journal: JournalCounters | None = None
    """What the journal counts; None where the server keeps none."""

    def with_state(
        self, memory: SessionMemory, images: ImageStore, sessions: int, active: int, turns: int
    ) -> Statistics:
        """A copy that also says how things stand now."""
        pool, counters = memory.pool, memory.counters
        return replace(
            self,
            first_token_seconds=self.first_token_seconds.copy(),
            between_tokens_seconds=self.between_tokens_seconds.copy(),
            sessions_open=sessions,
            sessions_active=active,
            turns_in_flight=turns,
            blocks_total=pool.blocks,
            blocks_free=pool.free,
            blocks_shared=pool.shared,
            host_bytes=memory.host_bytes,
            images=len(images),
            image_hits=images.hits,
            images_evicted=images.evictions,
            **asdict(counters),
        )

    @property
    def blocks_used(self) -> int:
        """Held by sessions."""
        return self.blocks_total - self.blocks_free

    @property
    def sessions_idle(self) -> int:
        """Open and without a turn."""
        return self.sessions_open - self.sessions_active
