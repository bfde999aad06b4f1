"""Turns computed on a device of known costs: the scheduler's policy without a clock or a model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from llava_triton.contract.settings import Settings
from llava_triton.engine.block_pool import BlockPool
from llava_triton.engine.scheduler import Scheduler, Work
from llava_triton.engine.session import Session
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.turn import QueuedTurn, RunningTurn, TurnRequest
from llava_triton.model.sampling import Draws, SamplingParameters

Cost = Callable[[int, int], float]
"""Seconds of a step, from how many answers and prompt tokens it advances."""
MANY_BLOCKS = 100_000


def cpu(answers: int, prompt_tokens: int) -> float:
    """Two cores, float32: reading the weights takes so long, and a row of an answer costs what a
    prompt token costs; to begin a chunk costs some more."""
    read, begin, row = 0.011, 0.003 if prompt_tokens else 0.0, 0.00083
    return read + begin + row * (answers + prompt_tokens)


def gpu(answers: int, prompt_tokens: int) -> float:
    """Reading the weights takes so long, whatever is multiplied with them, up to about 300 rows."""
    return max(0.010, 0.00003 * (answers + prompt_tokens)) + 0.0002 * answers


@dataclass
class Arrival:
    """A turn that comes at a time."""

    at: float
    prompt: int
    """Tokens to be computed before the first one of the answer."""
    answer: int = 32
    """Tokens of the answer."""
    session: int = 0
    """Whose it is, where one turn follows another."""


@dataclass(eq=False)
class Told:
    """What became of a turn: when its tokens came."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)

    @property
    def wait(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.arrival.at

    def intervals(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between its tokens, of those that end in this time."""
        pairs = itertools.pairwise(self.times)
        return [later - earlier for earlier, later in pairs if begin <= later <= end]


class SimulatedDevice:
    """Computes turns as the engine would, in simulated time.

    Args:
        cost: of a step.
        ahead: whether a step is planned while the one before is computed, as on a GPU.
        chunk: prompt tokens of a step at the most.
        blocks: of all sessions.
        **settings: of the scheduler.
    """

    def __init__(
        self,
        cost: Cost,
        *,
        ahead: bool = False,
        chunk: int = 512,
        blocks: int = MANY_BLOCKS,
        **settings: Any,
    ) -> None:
        self.now = 100.0
        self._cost = cost
        self._ahead = ahead
        self._memory = SessionMemory(BlockPool(blocks), cast(Any, _NoPages()), host_bytes=0)
        self.scheduler = Scheduler(
            self._memory, lambda: (), chunk, Settings(**settings), questions_alone=not ahead
        )
        self.steps: list[tuple[int, int, float]] = []
        """Answers, prompt tokens and seconds of each."""
        self.planned_ahead = 0
        """How many of them were planned while another one was computed."""

    def run(
        self, arrivals: Sequence[Arrival], follow: Callable[[Told], Arrival | None] = lambda _: None
    ) -> list[Told]:
        """Compute all turns to their end; their times are counted from now.

        Args:
            arrivals: turns.
            follow: the turn that comes when one has ended, if one does.
        """
        began = self.now
        told = [Told(each) for each in sorted(arrivals, key=lambda each: each.at)]
        coming = list(told)
        running: dict[str, tuple[RunningTurn, Told]] = {}
        flying: list[Work] = []
        while coming or running:
            while coming and began + coming[0].arrival.at <= self.now:
                turn = self._turn(began + coming[0].arrival.at, coming[0].arrival)
                running[turn.turn.id] = turn, coming.pop(0)
            works = flying
            if not works:
                works = self.scheduler.plan([turn for turn, _ in running.values()], self.now)
            if not works:
                assert coming, "nothing is computed, though turns wait"
                self.now = began + coming[0].arrival.at
                continue
            flying = []
            if self._ahead:
                turns = [turn for turn, _ in running.values()]
                flying = self.scheduler.plan_ahead(turns, works, self.now)
                self.planned_ahead += bool(flying)
            for ended in self._compute(works, running, began):
                next_one = follow(ended)
                if next_one is not None:
                    told.append(Told(next_one))
                    coming.append(told[-1])
            coming.sort(key=lambda each: each.arrival.at)
            flying = [each for each in flying if each.running.turn.id in running]
        return told

    def _compute(
        self, works: Sequence[Work], running: dict[str, tuple[RunningTurn, Told]], began: float
    ) -> list[Told]:
        """Compute a step; the turns that it ends."""
        ended = []
        answers = sum(work.decoding for work in works)
        prompt_tokens = sum(work.count for work in works if not work.decoding)
        seconds = self._cost(answers, prompt_tokens)
        self.now += seconds
        self.steps.append((answers, prompt_tokens, seconds))
        self.scheduler.clock.observe(answers, prompt_tokens, seconds)
        for work in works:
            turn = work.running
            self._memory.extend(turn.session, work.count)
            if turn.uncomputed:
                continue
            turn.session.tokens.append(1)
            turn.last_token_at = self.now
            told = running[turn.turn.id][1]
            told.times.append(self.now - began)
            if turn.answer_tokens == turn.max_tokens:
                ended.append(running.pop(turn.turn.id)[1])
                self._memory.truncate(turn.session, 0)
        return ended

    def _turn(self, at: float, arrival: Arrival) -> RunningTurn:
        turn = QueuedTurn(TurnRequest("simulated"), lambda _: None, arrived_at=at)
        session = Session("simulated", opened_at=at, last_used_at=at)
        session.tokens = [random.Random(turn.id).randrange(1000) for _ in range(arrival.prompt)]
        return running_turn(turn, session, arrival.prompt, arrival.answer)


def running_turn(turn: QueuedTurn, session: Session, prompt: int, answer: int) -> RunningTurn:
    """A turn whose tokens its session has, for tests that compute nothing.

    Args:
        turn, session: the turn and its session.
        prompt: tokens of the conversation up to where the answer begins.
        answer: of the answer at the most.
    """
    return RunningTurn(
        turn=turn,
        session=session,
        prompt_tokens=prompt,
        mark=session.mark(len(session.turns)),
        forgets=(),
        kept_mark=session.mark(len(session.turns)),
        max_tokens=answer,
        draws=Draws(SamplingParameters()),
        processors=cast(Any, None),
        detokenizer=cast(Any, None),
        token_texts=cast(Any, None),
        grammar=None,
        pending_images=0,
    )


class _NoPages:
    """Nothing is remembered on a host."""

    def host_bytes(self, blocks: int) -> int:
        """More than there is."""
        return 1 + blocks
