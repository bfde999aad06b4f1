"""Which turns advance in the next step, and by how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llava_triton.engine.session import Session
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.step_clock import StepClock
from llava_triton.engine.turn import Phase, RunningTurn
from llava_triton.model.step import token_after

QUESTION_TOKENS = 32
"""Prompts of no more tokens than this together are computed whole in one step: a question's answer
begins some steps earlier, for one pause that may be a little longer."""


@dataclass(frozen=True)
class Work:
    """A turn and how many of its next tokens a step computes."""

    running: RunningTurn
    count: int
    decoding: bool
    follows: tuple[int, Work] | None = None
    """Where the token to be computed is not known yet: the row of the step under way whose token it
    will be, and what that row computes."""

    @property
    def ids(self) -> list[int]:
        """What the step is given."""
        return self.ahead or self.running.next_ids(self.count)

    @property
    def ahead(self) -> list[int]:
        """Of these the one that nobody knows yet, if it is one."""
        return [] if self.follows is None else [token_after(self.follows[0])]

    @property
    def ends_in_a_token(self) -> bool:
        """Whether it brings the answer a token: its prompt does not go on, and it has one."""
        whole = self.follows is not None or self.count == self.running.uncomputed
        return whole and self.running.max_tokens > 0

    @property
    def tokens_under_way(self) -> int:
        """Tokens behind those that the session remembers which the step under way computes."""
        return 0 if self.follows is None else self.follows[1].count


class Scheduler:
    """Plans steps: every running answer advances by a token, and prompts share what time is left.

    Turns take blocks in the order they began: from what is free, from idle sessions (longest
    unused first), then from turns that began later, which are put back. So the oldest turn always
    goes on, and every turn becomes the oldest one day.

    Args:
        memory: the sessions' blocks.
        idle_sessions: sessions without a turn, longest unused first.
        chunk_tokens: prompt tokens of a step at the most.
        questions_alone: compute questions in a step of their own, after which the running answers
            advance first. For devices on which a question's tokens take as long as a step of
            answers: its first token does not wait for theirs, and they wait as long either way.
    """

    def __init__(
        self,
        memory: SessionMemory,
        idle_sessions: Callable[[], Iterable[Session]],
        chunk_tokens: int,
        *,
        questions_alone: bool = False,
    ) -> None:
        self.clock = StepClock()
        self._memory = memory
        self._idle_sessions = idle_sessions
        self._chunk_tokens = chunk_tokens
        self._most_question_tokens = min(QUESTION_TOKENS, chunk_tokens)
        self._questions_alone = questions_alone
        self._answers_waited = False
        """Whether the last step was one of questions alone."""

    def plan(self, turns: Sequence[RunningTurn]) -> list[Work]:
        """The next step's work.

        Args:
            turns: all running ones, in the order they began.
        """
        going = [turn for turn in turns if not turn.finish_reason]
        decoding = sum(turn.decoding for turn in going)
        questions_alone = self._questions_alone and decoding > 0
        if questions_alone and not self._answers_waited:
            questions = self._questions(going)
            if questions:
                self._answers_waited = True
                return questions
        self._answers_waited = False
        budget = self.clock.plan(decoding, self._chunk_tokens)
        whole = 0 if questions_alone else self._most_question_tokens
        works: list[Work] = []
        for index, turn in enumerate(going):
            is_decoding = turn.decoding
            is_question = _is_question(turn, whole)
            if budget == 0 and not (is_decoding or is_question):
                continue
            if not self._make_room(turn, going[index + 1 :]):
                continue
            count = 1
            if not is_decoding:
                count = turn.uncomputed if is_question else min(budget, turn.uncomputed)
                budget, whole = max(0, budget - count), whole - count
            works.append(Work(turn, count, is_decoding))
        return works

    def plan_ahead(self, turns: Sequence[RunningTurn], under_way: Sequence[Work]) -> list[Work]:
        """The work of a step that begins when the one under way ends, whatever its tokens are.

        A turn that ends with one of them is computed in vain: its session keeps nothing of it.

        Args:
            turns: all running ones, in the order they began.
            under_way: the works of the only step that the device has.

        Returns:
            Nothing where another plan will be better when that step is done: where turns wait to
            be computed, or blocks are scarce.
        """
        works: list[Work] = []
        rows = {work.running.turn.id: row for row, work in enumerate(under_way)}
        for turn in turns:
            if turn.finish_reason:
                continue
            row = rows.get(turn.turn.id)
            if row is None and turn.decoding and turn.grammar is not None:
                if not self._make_room(turn, ()):
                    return []
                works.append(Work(turn, 1, decoding=True))
                continue
            if row is None or under_way[row].count < turn.uncomputed:
                return []
            if turn.grammar is not None:  # its next token depends on the one under way
                continue
            if turn.answer_tokens + 1 < turn.max_tokens:
                if not self._make_room(turn, (), coming=1):
                    return []
                works.append(Work(turn, 1, decoding=True, follows=(row, under_way[row])))
        return works

    def _questions(self, going: Sequence[RunningTurn]) -> list[Work]:
        works: list[Work] = []
        left = self._most_question_tokens
        for index, turn in enumerate(going):
            if _is_question(turn, left) and self._make_room(turn, going[index + 1 :]):
                works.append(Work(turn, turn.uncomputed, decoding=False))
                left -= turn.uncomputed
        return works

    def _make_room(
        self, turn: RunningTurn, younger: Sequence[RunningTurn], coming: int = 0
    ) -> bool:
        while not self._has_room(turn, coming):
            victim = self._victim(younger)
            if victim is None:
                return False
            self._memory.evict(victim)
        return True

    def _has_room(self, turn: RunningTurn, coming: int) -> bool:
        session = turn.session
        if turn.phase is Phase.COMPUTING:
            return self._memory.reserve(session, len(session.tokens) + coming)
        if not self._memory.admit(session):
            return False
        if turn.phase is Phase.NEW:
            turn.cached_tokens = min(session.key_values.computed, turn.prompt_tokens)
        turn.phase = Phase.COMPUTING
        return True

    def _victim(self, younger: Sequence[RunningTurn]) -> Session | None:
        for session in self._idle_sessions():
            if session.key_values.blocks:
                return session
        for turn in reversed(younger):
            if turn.session.key_values.blocks:
                if turn.phase is Phase.COMPUTING:
                    turn.phase = Phase.PUT_BACK
                return turn.session
        return None


def _is_question(turn: RunningTurn, most: int) -> bool:
    """Whether a turn has a prompt to compute of at most so many tokens."""
    if turn.decoding:
        return False
    return max(turn.uncomputed, turn.prompt_tokens - turn.cached_tokens) <= most
