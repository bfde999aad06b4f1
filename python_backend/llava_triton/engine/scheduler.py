"""Which turns advance in the next step, and by how many tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llava_triton.contract.settings import Settings
from llava_triton.engine.session import Session
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.step_clock import StepClock
from llava_triton.engine.turn import Phase, RunningTurn
from llava_triton.model.step import token_after

INTERVAL_GROWTH = 2.0
"""Where the target is out of reach, prompts may make the time between tokens so many times what it
is without them."""
AIM = 0.95
"""Share of that time which a step of prompts is planned to take: estimates are somewhat wrong."""
ENDING = 1.1
"""The same where the step ends a prompt: what is left of it would wait for a whole interval more.
"""
OF_THEIR_OWN = 1.25
"""The same where short prompts have a step of their own first. The first token comes a whole step
of answers earlier; a stream's next one comes some milliseconds later, which nobody sees."""
QUESTION_TOKENS = 64
"""Prompts of no more tokens than this are short on any machine."""
LEAST_CHUNK = 4
"""Prompt tokens of such a step at the least, so that every prompt goes on."""


@dataclass(frozen=True)
class Work:
    """A turn and how many of its next tokens a step computes."""

    running: RunningTurn
    count: int
    decoding: bool
    before: Work | None = None
    """What the step in flight computes of the same turn."""
    row: int | None = None
    """Where the token to be computed is not known yet: the row of the step in flight whose token it
    will be."""

    @property
    def ids(self) -> list[int]:
        """What the step is given."""
        return self.ahead or self.running.next_ids(self.count, behind=self.tokens_in_flight)

    @property
    def ahead(self) -> list[int]:
        """Of these the one that nobody knows yet, if it is one."""
        return [] if self.row is None else [token_after(self.row)]

    @property
    def ends_in_a_token(self) -> bool:
        """Whether it brings the answer a token: its prompt does not go on, and it has one."""
        end = self.tokens_in_flight + self.count
        return self.running.max_tokens > 0 and (
            self.row is not None or end == self.running.uncomputed
        )

    @property
    def tokens_in_flight(self) -> int:
        """Tokens behind those that the session remembers which the step in flight computes."""
        return 0 if self.before is None else self.before.count


@dataclass(frozen=True)
class _Next:
    """A turn as it will be when the step begins that is planned."""

    turn: RunningTurn
    before: Work | None = None
    """As in `Work`."""
    row: int | None = None
    """As in `Work`."""

    @property
    def decoding(self) -> bool:
        """Whether the step brings the next token of an answer in flight."""
        return self.turn.decoding if self.before is None else self.row is not None

    @property
    def uncomputed(self) -> int:
        """Its tokens that are there and that no step has computed."""
        if self.row is not None:
            return 1
        return self.turn.uncomputed - (self.before.count if self.before else 0)

    def is_at_most(self, tokens: int) -> bool:
        """Whether it has a prompt to compute, of at most so many tokens with what is done of it."""
        prompt = self.turn.prompt_tokens - self.turn.cached_tokens
        return not self.decoding and max(self.uncomputed, prompt) <= tokens


@dataclass(frozen=True)
class _Room:
    """Prompt tokens that a step may compute."""

    chunks: int
    ending: int
    """As `chunks`, of a chunk that ends its prompt."""
    short: int
    """Of these, at most so many for short prompts, which go first."""


class Scheduler:
    """Plans steps: every running answer advances by a token, and prompts get what time is left.

    **How much.** A step of prompts beside answers may take `target_between_tokens_ms` (or twice the
    time that the answers take alone, if that is longer), counted from the answers' last tokens. So
    the time between two tokens is bounded, and prompts get all the rest.

    **Who first.** Short prompts, as most questions are, and then the others, in the order their
    turns came. Short are those whose computation takes no longer than the time between two tokens,
    and of `QUESTION_TOKENS` at the most on a slow machine. So they delay the others by little,
    until there are many of them: where a longer prompt has waited for `target_first_token_ms`,
    short ones are computed in every second interval only.

    **Blocks.** Turns take them in the order they began: from what is free, from idle sessions
    (longest unused first), then from turns that began later, which are put back. So the oldest turn
    always goes on, and every turn becomes the oldest one day.

    Args:
        memory: the sessions' blocks.
        idle_sessions: those that have blocks and no turn, longest unused first.
        chunk_tokens: prompt tokens of a step at the most.
        settings: the two targets.
        questions_alone: compute short prompts in a step of their own, after which the running
            answers advance first. For devices on which a question's tokens take as long as a step
            of answers: its first token does not wait for theirs, and they wait as long either way.
    """

    def __init__(
        self,
        memory: SessionMemory,
        idle_sessions: Callable[[], Iterable[Session]],
        chunk_tokens: int,
        settings: Settings,
        *,
        questions_alone: bool = False,
    ) -> None:
        self.clock = StepClock()
        self._memory = memory
        self._idle_sessions = idle_sessions
        self._chunk_tokens = chunk_tokens
        self._target_interval = settings.target_between_tokens_ms / 1000.0
        self._patience = settings.target_first_token_ms / 1000.0
        self._questions_alone = questions_alone
        self._answers_wait = False
        """Whether the last step was one of questions alone."""
        self._prompts_wait = False
        """Whether the last interval was one of short prompts."""

    @property
    def interval(self) -> float:
        """Seconds that may pass between two tokens of an answer while prompts are computed."""
        return max(self._target_interval, INTERVAL_GROWTH * self.clock.decode_seconds)

    def plan(self, turns: Sequence[RunningTurn], now: float) -> list[Work]:
        """The next step's work, where the device has none.

        Args:
            turns: all running ones, in the order they began.
            now: seconds, by the clock of the turns' own times.
        """
        going = [_Next(turn) for turn in turns if not turn.finish_reason]
        answers = [each.turn.last_token_at for each in going if each.decoding]
        seconds = min(answers) + self.interval - now if answers else self.interval
        if self._questions_alone:
            questions = self._questions_of_their_own(going, len(answers), seconds, now)
            if questions:
                self._answers_wait = self._prompts_wait = True
                return questions
        works = self._works(going, self._room(going, len(answers), seconds, now))
        if not works:  # no answer found a block: older prompts have them all, and go on
            works = self._works(going, _Room(self._chunk_tokens, self._chunk_tokens, 0))
        if not self._answers_wait:
            self._prompts_wait = self._has_short(works)
        self._answers_wait = False
        return works

    def plan_ahead(
        self, turns: Sequence[RunningTurn], in_flight: Sequence[Work], now: float
    ) -> list[Work]:
        """The work of a step that begins when the one in flight ends, whatever its tokens are.

        A turn that ends with one of them is computed in vain: its session keeps nothing of it.

        Args:
            turns: all running ones, in the order they began.
            in_flight: the works of the only step that the device has.
            now: as for `plan`.

        Returns:
            Nothing where another plan will be better when that step is done: where questions want a
            step of their own, or blocks are scarce.
        """
        rows = {work.running.turn.id: row for row, work in enumerate(in_flight)}
        going = []
        formed = 0
        """Answers that this step leaves out and that wait for it."""
        for turn in turns:
            row = rows.get(turn.turn.id)
            if turn.finish_reason:
                continue
            if row is None:
                if turn.decoding and turn.grammar is None:  # it found no blocks
                    return []
                going.append(_Next(turn))
            elif in_flight[row].count < turn.uncomputed:
                going.append(_Next(turn, in_flight[row]))
            elif turn.grammar is not None:  # its next token depends on the one in flight
                formed += 1
            elif turn.answer_tokens + 1 < turn.max_tokens:
                going.append(_Next(turn, in_flight[row], row))
        decoding = sum(each.decoding for each in going)
        if self._questions_alone and decoding < len(going):
            return []
        room = self._room(going, decoding + formed, self.interval, now)
        works = self._works(going, room, ahead=True)
        self._prompts_wait = self._has_short(works)
        return works

    def _short(self) -> int:
        """Tokens of a short prompt at the most."""
        tokens = max(QUESTION_TOKENS, self.clock.tokens_alone(self.interval))
        return min(self._chunk_tokens, tokens)

    def _has_short(self, works: Iterable[Work]) -> bool:
        short = self._short()
        return any(_Next(work.running, work.before, work.row).is_at_most(short) for work in works)

    def _is_late(self, going: Iterable[_Next], now: float) -> bool:
        """Whether a prompt that is not short has waited too long."""
        short = self._short()
        return any(
            now - each.turn.turn.arrived_at > self._patience
            for each in going
            if not (each.decoding or each.is_at_most(short))
        )

    def _questions_of_their_own(
        self, going: Sequence[_Next], answers: int, seconds: float, now: float
    ) -> list[Work]:
        """Short prompts that are computed now, while everything else waits; empty: not now."""
        if (answers and self._answers_wait) or (self._prompts_wait and self._is_late(going, now)):
            return []
        short, spare = self._short(), math.inf
        if answers:  # their own step comes behind it, in the same interval
            spare = seconds + (OF_THEIR_OWN - 1.0) * self.interval - self.clock.decode_seconds
        if not answers and all(each.is_at_most(short) for each in going):
            return []  # nothing else would wait
        works: list[Work] = []
        tokens = 0
        for index, each in enumerate(going):
            together = tokens + each.uncomputed
            if (
                each.is_at_most(short)
                and together <= short
                and self.clock.alone_seconds(together) <= spare
                and self._make_room(each, going[index + 1 :])
            ):
                works.append(Work(each.turn, each.uncomputed, decoding=False))
                tokens += each.uncomputed
        return works

    def _room(self, going: Sequence[_Next], answers: int, seconds: float, now: float) -> _Room:
        most = self._chunk_tokens
        if all(each.decoding for each in going):
            return _Room(0, 0, 0)
        held_back = self._prompts_wait and self._is_late(going, now)
        if not answers:
            return _Room(most, most, 0 if held_back else self._short())
        short = self._short()
        hurry = not held_back and any(each.is_at_most(short) for each in going)
        if self.clock.takes_look(answers, hurry=hurry):
            return _Room(0, 0, 0)
        beside, interval = self.clock.tokens_beside, self.interval
        ending = min(most, beside(seconds + (ENDING - 1.0) * interval))
        chunks = min(most, beside(seconds + (AIM - 1.0) * interval))
        if not self._answers_wait:
            chunks = max(chunks, min(most, LEAST_CHUNK))
        ending = max(chunks, ending)
        return _Room(chunks, ending, 0 if held_back else ending)

    def _works(self, going: Sequence[_Next], room: _Room, *, ahead: bool = False) -> list[Work]:
        """Every answer's next token, and as much of the prompts as there is room for.

        Args:
            going: in the order they began.
            room: for prompt tokens.
            ahead: while a step is in flight, no turn is put back: it may be in that step. Where
                blocks are too few, nothing is planned.
        """
        counts = self._counts(going, room)
        works: list[Work] = []
        for index, (each, count) in enumerate(zip(going, counts, strict=True)):
            if not count:
                continue
            if self._make_room(each, () if ahead else going[index + 1 :]):
                count = min(count, each.uncomputed)  # a prefix may have been found
                works.append(Work(each.turn, count, each.decoding, each.before, each.row))
            elif ahead:
                return []
        return works

    def _counts(self, going: Sequence[_Next], room: _Room) -> list[int]:
        """How many of each turn's tokens a step with so much room computes."""
        counts = [int(each.decoding) for each in going]
        most_short = self._short()
        prompts = [index for index, each in enumerate(going) if not each.decoding]
        short = [index for index in prompts if going[index].is_at_most(most_short)]
        others = [index for index in prompts if not going[index].is_at_most(most_short)]
        if len(prompts) == len(going):
            others = others[:1]  # a younger one would only make it wait for its first token
        used = 0
        for limit, indices in ((min(room.short, room.ending), short), (room.ending, others)):
            for index in indices:
                count = going[index].uncomputed
                if used + count > limit:
                    count = max(0, min(limit, room.chunks) - used)
                counts[index] = count
                used += count
        return counts

    def _make_room(self, each: _Next, younger: Sequence[_Next]) -> bool:
        while not self._has_room(each.turn, coming=each.row is not None):
            victim = self.victim([other.turn for other in younger])
            if victim is None:
                return False
            self._memory.evict(victim)
        return True

    def _has_room(self, turn: RunningTurn, coming: bool) -> bool:
        session = turn.session
        if turn.phase is Phase.COMPUTING:
            return self._memory.reserve(session, len(session.tokens) + coming)
        if not self._memory.admit(session):
            return False
        if turn.phase is Phase.NEW:
            turn.cached_tokens = min(session.key_values.computed, turn.prompt_tokens)
        turn.phase = Phase.COMPUTING
        return True

    def victim(self, younger: Sequence[RunningTurn]) -> Session | None:
        """The session that gives up its blocks next: an idle one, else one of these turns', last
        ones first. The turn is put back. None where no other session has any."""
        idle = next(iter(self._idle_sessions()), None)
        if idle is not None:
            return idle
        for turn in reversed(younger):
            if turn.session.key_values.blocks:
                if turn.phase is Phase.COMPUTING:
                    turn.phase = Phase.PUT_BACK
                return turn.session
        return None
