"""Which turns advance in the next step, and by how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llava_triton.engine.session import Session
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.turn import RunningTurn

STALL = 1.4
"""A step that also computes prompts may take this many times as long as one that only advances
running answers: a stream's pause stays below twice its usual interval, also where the estimate of
the time is somewhat wrong."""
LEAST_CHUNK = 8
"""Prompt tokens of a step at the least, so that every prompt goes on."""
QUESTION_TOKENS = 48
"""A prompt of no more tokens than this is computed in one step, one of them a step: a question's
answer begins a step earlier, for one pause that may be a little longer."""
SMOOTHING = 0.3
"""Weight of the newest measurement of how long steps take."""


@dataclass(frozen=True)
class Work:
    """A turn and the tokens that the next step computes for it."""

    running: RunningTurn
    ids: list[int]
    decoding: bool


class StepClock:
    """How long steps take, learned from those that were done.

    A step is taken for the time of its running answers plus a time per prompt token.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._seconds_per_prompt_token: float | None = None

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many running answers and prompt tokens took so long."""
        if not prompt_tokens:
            self._decode_seconds = _smoothed(self._decode_seconds, seconds)
            return
        rest = seconds - (self._decode_seconds or 0.0 if decoding else 0.0)
        per_token = max(rest, 0.1 * seconds) / prompt_tokens
        self._seconds_per_prompt_token = _smoothed(self._seconds_per_prompt_token, per_token)

    def prompt_tokens_beside(self, decoding: int, most: int) -> int:
        """How many prompt tokens a step may compute beside so many running answers."""
        decode, per_token = self._decode_seconds, self._seconds_per_prompt_token
        if not decoding or decode is None or per_token is None:
            return most
        return min(most, max(LEAST_CHUNK, int((STALL - 1.0) * decode / per_token)))


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else (1.0 - SMOOTHING) * before + SMOOTHING * now


class Scheduler:
    """Plans steps: every running answer advances by a token, and prompts share what time is left.

    Turns take blocks in the order they began: from what is free, from idle sessions (longest
    unused first), then from turns that began later, which are put back. So the oldest turn always
    goes on, and every turn becomes the oldest one day.

    Args:
        memory: the sessions' blocks.
        idle_sessions: sessions without a turn, longest unused first.
        chunk_tokens: prompt tokens of a step at the most.
    """

    def __init__(
        self,
        memory: SessionMemory,
        idle_sessions: Callable[[], Iterable[Session]],
        chunk_tokens: int,
    ) -> None:
        self.clock = StepClock()
        self._memory = memory
        self._idle_sessions = idle_sessions
        self._chunk_tokens = chunk_tokens

    def plan(self, turns: Sequence[RunningTurn]) -> list[Work]:
        """The next step's work.

        Args:
            turns: all running ones, in the order they began.
        """
        going = [turn for turn in turns if not turn.finish_reason]
        decoding = sum(turn.decoding for turn in going)
        budget = self.clock.prompt_tokens_beside(decoding, self._chunk_tokens)
        whole = min(QUESTION_TOKENS, self._chunk_tokens)
        works: list[Work] = []
        for index, turn in enumerate(going):
            is_decoding = turn.decoding
            if not is_decoding and budget == 0:
                continue
            if not self._make_room(turn, going[index + 1 :]):
                continue
            if is_decoding:
                count = 1
            else:
                prompt_tokens = len(turn.prompt) - turn.cached_tokens
                is_question = max(turn.uncomputed, prompt_tokens) <= whole
                count = turn.uncomputed if is_question else min(budget, turn.uncomputed)
                budget, whole = max(0, budget - count), 0
            works.append(Work(turn, turn.next_ids(count), is_decoding))
        return works

    def _make_room(self, turn: RunningTurn, younger: Sequence[RunningTurn]) -> bool:
        while not self._has_room(turn):
            victim = self._victim(younger)
            if victim is None:
                return False
            self._memory.evict(victim)
        return True

    def _has_room(self, turn: RunningTurn) -> bool:
        tokens = len(turn.prompt) + len(turn.answer)
        if turn.admitted:
            return self._memory.reserve(turn.session, tokens)
        if not self._memory.admit(turn.session, turn.prompt, tokens):
            return False
        turn.admitted = True
        if not turn.begun:
            turn.begun = True
            turn.cached_tokens = min(len(turn.session.key_values), len(turn.prompt))
        return True

    def _victim(self, younger: Sequence[RunningTurn]) -> Session | None:
        for session in self._idle_sessions():
            if session.key_values.blocks:
                return session
        for turn in reversed(younger):
            if turn.session.key_values.blocks:
                turn.admitted = False
                return turn.session
        return None
