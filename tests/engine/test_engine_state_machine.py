"""The engine under random operations: its books add up, and a plain model of the rules agrees."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

import tests.engine_harness
from llava_triton.contract.errors import ErrorCode
from llava_triton.contract.operations import NO_OPERATION, Operation
from llava_triton.engine.session import SessionId
from tests.checkpoints import tiny_llava
from tests.engine_harness import EngineHarness, FailingStep
from tests.properties import settings
from tests.session_rules import (
    IDLE_SECONDS,
    IDS,
    LIFETIME_SECONDS,
    MAX_SESSIONS,
    NOTHING,
    PICTURES,
    PICTURES_ON_DEVICE,
    PICTURES_ON_HOST,
    POOL_BLOCKS,
    ROOM_FOR_PICTURES,
    STRANGER,
    TENANTS,
    Closing,
    Conversation,
    Flight,
    Limits,
    Open,
    Oracle,
    Reply,
    Talk,
    gone_back,
    submit,
    talks,
    talks_of,
)

EXAMPLES = 35
STEPS = 40
HANG_SECONDS = 20.0


ids = st.sampled_from(IDS)
operations = st.sampled_from([Operation(regenerate=True), *map(Operation, range(4))])
# Few of them, so that sessions often begin alike.
openings = talks((0,), (), (1,), (0, 1), (2,))
later_talks = talks((), (), (), (3,), (), (4, 5), (0,), (6,), (7, 7))
picks = st.integers(0, 11)
seldom = st.integers(0, 5).map(lambda number: number == 5)


class EngineMachine(RuleBasedStateMachine):
    """Turns go into the engine at once; `_drain` waits for them and holds them against the rules.

    Args:
        harness: the engine under test.
        oracle: knows the right answers.
    """

    def __init__(self, harness: EngineHarness, oracle: Oracle) -> None:
        super().__init__()
        self._harness = harness
        self._oracle = oracle
        self._clock = harness.clock
        self._sessions: dict[SessionId, Open] = {}
        self._flights: list[Flight | Closing] = []
        self._completed = self._cancelled = self._cancelled_ends = self._failures = 0
        self._failed = False
        """A rule is broken already: the rest says nothing."""
        harness.restart()

    # What can happen. Nothing that is drawn may depend on how turns ended: that is a matter of time
    # where they are cancelled, and Hypothesis must be able to draw the same again.

    @property
    def _likely(self) -> list[SessionId]:
        """Sessions that are open if every turn in flight does what it should."""
        likely = dict.fromkeys(self._sessions)
        for flight in self._flights:
            if isinstance(flight, Closing) or flight.end:
                likely.pop(flight.session_id, None)
            elif flight.start:
                likely[flight.session_id] = None
        return list(likely)

    def _likely_id(self, pick: int) -> SessionId:
        """One of them; any ID where there is none."""
        likely = self._likely or IDS
        return likely[pick % len(likely)]

    @rule(session_id=ids, talk=openings, end=seldom, wait=st.booleans())
    def start(self, session_id: SessionId, talk: Talk, end: bool, wait: bool) -> None:
        self._submit(session_id, talk, start=True, end=end)
        if wait:
            self._drain()

    @rule(pick=picks, talk=later_talks, wait=st.booleans())
    def turn(self, pick: int, talk: Talk, wait: bool) -> None:
        self._submit(self._likely_id(pick), talk)
        if wait:
            self._drain()

    @rule(some=st.lists(st.tuples(picks, later_talks), min_size=2, max_size=4))
    def several_turns(self, some: list[tuple[int, Talk]]) -> None:
        for pick, talk in some:
            self._submit(self._likely_id(pick), talk)

    @rule(talk=openings, some=st.lists(later_talks, max_size=2))
    def everybody_says_the_same(self, talk: Talk, some: list[Talk]) -> None:
        for session_id in IDS[:MAX_SESSIONS]:
            self._submit(session_id, talk, start=session_id not in self._likely)
        for each in some:
            for session_id in IDS[:MAX_SESSIONS]:
                self._submit(session_id, each)

    @rule(pick=picks, picture=st.integers(0, len(PICTURES) - 1), wait=st.booleans())
    def picture_without_text(self, pick: int, picture: int, wait: bool) -> None:
        self._submit(self._likely_id(pick), Talk(None, (picture,)))
        if wait:
            self._drain()

    @rule(pick=picks, talk=later_talks, operation=operations, end=seldom, wait=st.booleans())
    def go_back(self, pick: int, talk: Talk, operation: Operation, end: bool, wait: bool) -> None:
        if operation.regenerate:
            talk = replace(talk, text=None, pictures=())
        self._submit(self._likely_id(pick), talk, end=end, operation=operation)
        if wait:
            self._drain()

    @rule(session_id=ids, pick=picks, turns=st.one_of(st.none(), st.integers(0, 3)))
    def fork(self, session_id: SessionId, pick: int, turns: int | None) -> None:
        self._drain()  # it has what its source has said when it begins
        operation = Operation(fork=self._likely_id(pick), rewind=turns)
        self._submit(session_id, NOTHING, start=True, operation=operation)

    @rule(session_id=ids, pick=picks, talk=later_talks, end=seldom)
    def another_answer(self, session_id: SessionId, pick: int, talk: Talk, end: bool) -> None:
        self._drain()  # its source's last question is what it answers
        operation = Operation(fork=self._likely_id(pick), regenerate=True)
        asked = () if talk.forgets else talk.asked  # of an opening it would hold from then on
        talk = replace(talk, text=None, pictures=(), asked=asked)
        self._submit(session_id, talk, start=True, end=end, operation=operation)

    @rule(pick=picks)
    def stop(self, pick: int) -> None:
        self._stop(self._likely_id(pick))

    @rule(pick=picks, talk=later_talks, waits=st.booleans(), another=later_talks)
    def stop_an_answer(self, pick: int, talk: Talk, waits: bool, another: Talk) -> None:
        session_id = self._likely_id(pick)
        heard = threading.Event()
        talk = replace(talk, text=talk.text or "Go on.", max_tokens=40)
        self._submit(session_id, talk, listen=lambda _: heard.set())
        self._submit(session_id, another)
        assert not waits or heard.wait(HANG_SECONDS)
        self._stop(session_id)

    @rule(pick=picks, talk=st.one_of(st.just(NOTHING), later_talks), operation=operations)
    def cancel_a_turn_that_goes_back(self, pick: int, talk: Talk, operation: Operation) -> None:
        session_id = self._likely_id(pick)
        talk = replace(talk, max_tokens=40)
        if operation.regenerate:
            talk = replace(talk, text=None, pictures=())
        self._cancel(self._submit(session_id, talk, operation=operation))

    @rule(pick=picks, talk=st.one_of(st.just(NOTHING), later_talks), wait=st.booleans())
    def end(self, pick: int, talk: Talk, wait: bool) -> None:
        self._submit(self._likely_id(pick), talk, end=True)
        if wait:
            self._drain()

    @rule(session_id=ids, talk=later_talks, end=seldom)
    def turn_of_whatever_session(self, session_id: SessionId, talk: Talk, end: bool) -> None:
        self._submit(session_id, talk, end=end)

    @rule(session_id=ids, talk=openings, start=st.booleans(), end=seldom)
    def turn_of_a_stranger(self, session_id: SessionId, talk: Talk, start: bool, end: bool) -> None:
        self._submit(session_id, talk, start=start, end=end, tenant=STRANGER)

    @rule(
        session_id=ids,
        talk=st.sampled_from([NOTHING, Talk("o " * 450), Talk("an <image>?"), Talk("long " * 500)]),
        start=st.booleans(),
        end=seldom,
    )
    def bad_input(self, session_id: SessionId, talk: Talk, start: bool, end: bool) -> None:
        self._submit(session_id, talk, start=start, end=end)

    @rule()
    def drain(self) -> None:
        self._drain()

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        if not self._flights:
            return
        index = pick % len(self._flights)
        flight = self._flights[index]
        if isinstance(flight, Closing):
            return
        # Cancelled, a START on an open ID has closed the old session or not: it depends on whether
        # it ran already.
        earlier = {each.session_id for each in self._flights[:index]} | set(self._sessions)
        if not (flight.start and flight.session_id in earlier):
            self._cancel(flight)

    @rule(pick=picks, talk=later_talks, end=st.booleans())
    def cancel_a_waiting_turn(self, pick: int, talk: Talk, end: bool) -> None:
        session_id = self._likely_id(pick)
        self._submit(session_id, Talk("Go on.", max_tokens=40))
        self._cancel(self._submit(session_id, talk, end=end))

    @rule(opening=openings, pictures=st.sampled_from([(), (), (3,)]), other_talk=later_talks)
    def cancel_a_turn_that_a_twin_shares(
        self, opening: Talk, pictures: tuple[int, ...], other_talk: Talk
    ) -> None:
        """The next turn of the one writes where the other reads, unless a block is copied."""
        one, other = IDS[:2]  # of one tenant
        for session_id in (one, other):
            self._submit(session_id, opening, start=True)
        self._drain()
        if any(
            name not in self._sessions or self._sessions[name].tenant == STRANGER
            for name in (one, other)
        ):
            return
        talk = Talk("Why so? " * 5, pictures, max_tokens=40)
        heard = threading.Event()
        cancelled = self._submit(one, talk, listen=lambda _: heard.set())
        assert heard.wait(HANG_SECONDS)
        self._submit(other, replace(talk, max_tokens=1)).wait()
        self._cancel(cancelled)
        self._submit(one, other_talk)
        self._submit(other, other_talk)

    @rule()
    def cancel_an_unknown_turn(self) -> None:
        self._harness.engine.cancel("no such turn")

    @rule(session_id=ids)
    def close(self, session_id: SessionId) -> None:
        for flight in self._flights:
            if isinstance(flight, Flight) and flight.session_id == session_id:
                flight.may_be_cancelled = True
        self._flights.append(Closing(session_id))
        self._harness.engine.close(session_id)

    @rule(seconds=st.sampled_from([30.0, 60.0, 98.0, 101.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        self._drain()
        self._clock.now += seconds
        for session_id, session in list(self._sessions.items()):
            if (
                session.used_at + IDLE_SECONDS <= self._clock.now
                or session.opened_at + LIFETIME_SECONDS <= self._clock.now
            ):
                del self._sessions[session_id]
        # The sweep, which would come within a second.
        self._harness.inspect(lambda state: state.sessions.expire(state.lanes))

    @rule(poison=st.booleans(), session_ids=st.sets(ids))
    def memory_pressure(self, poison: bool, session_ids: set[SessionId]) -> None:
        self._harness.evict_idle(*session_ids)
        if poison:
            self._harness.poison_free_blocks()

    @rule(session_id=ids, talk=later_talks, start=st.booleans(), end=seldom)
    def failing_step(self, session_id: SessionId, talk: Talk, start: bool, end: bool) -> None:
        self._drain()
        with self._harness.failing_step() as step:
            self._submit(session_id, talk, start=start, end=end)
            self._drain(step)

    @rule(first=later_talks, second=later_talks)
    def failing_step_of_several(self, first: Talk, second: Talk) -> None:
        """Whichever turns it has, each is tried again alone, and none is to blame."""
        self._drain()
        with self._harness.failing_step(turns=2):
            for session_id, talk in zip(self._sessions, (first, second), strict=False):
                self._submit(session_id, talk)
            self._drain()

    # What must be true.

    @invariant()
    def books_add_up(self) -> None:
        failed, self._failed = self._failed, True
        self._harness.check_state()
        self._failed = failed

    def teardown(self) -> None:
        if self._failed:
            return
        self._drain()
        for session_id in self._sessions:
            self._harness.engine.close(session_id)
        self._harness.assert_nothing_is_held()
        now = self._harness.engine.statistics()
        assert now.turns_cancelled == self._cancelled
        # The end that comes in the place of a cancelled END may count or not.
        counted = now.turns_completed + now.turns_failed + now.turns_refused
        assert 0 <= counted - self._completed - self._failures <= self._cancelled_ends
        assert now.sessions_opened == now.sessions_closed

    # How a turn goes.

    def _submit(
        self,
        session_id: SessionId,
        talk: Talk,
        *,
        start: bool = False,
        end: bool = False,
        tenant: str | None = None,
        operation: Operation = NO_OPERATION,
        listen: Callable[[object], None] | None = None,
    ) -> Flight:
        tenant = TENANTS[session_id] if tenant is None else tenant
        flags: dict[str, Any] = {
            "start": start,
            "end": end,
            "tenant": tenant,
            "operation": operation,
        }
        pending = submit(self._harness, session_id, talk, **flags, listen=listen)
        flight = Flight(session_id, talk, **flags, pending=pending)
        self._flights.append(flight)
        return flight

    def _cancel(self, flight: Flight) -> None:
        flight.may_be_cancelled = True
        self._harness.engine.cancel(flight.pending.id)

    def _stop(self, session_id: SessionId) -> None:
        """Stop whichever answer the session is giving."""
        for flight in self._flights:
            if isinstance(flight, Flight) and flight.session_id == session_id:
                flight.may_be_stopped = True
        self._harness.engine.stop_answer(session_id, TENANTS[session_id], lambda _: None)

    def _drain(self, step: FailingStep | None = None) -> None:
        """Wait for every turn, then hold them all against the rules."""
        flights, self._flights = self._flights, []
        self._failed = True
        for flight in flights:
            if isinstance(flight, Flight):
                flight.wait()
        if step is not None:
            failed = [flight for flight in flights if isinstance(flight, Flight)]
            failed = [flight for flight in failed if flight.result is ErrorCode.INTERNAL]
            # A step ahead may have computed a token of a turn that had ended with the one before.
            in_vain = self._harness.runner.steps_at_once > 1 and not failed
            assert len(failed) == step.turns or in_vain, "the step of one turn fails that turn"
        limits = Limits(self._sessions, flights)
        for flight in flights:
            if isinstance(flight, Closing):
                self._sessions.pop(flight.session_id, None)
                continue
            if flight.result is ErrorCode.CANCELLED:
                assert flight.may_be_cancelled
                self._undone(flight)
                self._cancelled += 1
                self._cancelled_ends += flight.end
            elif flight.result is ErrorCode.INTERNAL:
                assert step is not None
                self._undone(flight)
                self._failures += 1
            else:
                self._ended(flight, limits)
        # An answer is told before what follows it in its lane has begun.
        while self._harness.inspect(lambda state: state.lanes.turns):
            pass
        opened = self._harness.inspect(lambda state: list(state.sessions.oldest_first()))
        assert {each.id for each in opened} == set(self._sessions)
        self._failed = False

    def _undone(self, flight: Flight) -> None:
        """A turn that was cancelled or failed, before it began or later."""
        if flight.start or flight.end:
            self._sessions.pop(flight.session_id, None)
            return
        session_id, model = flight.session_id, self._sessions.get(flight.session_id)
        opened = self._harness.inspect(lambda state: list(state.sessions.oldest_first()))
        found = next((each for each in opened if each.id == session_id), None)
        if model is not None and found is not None:  # a turn that never began is no use
            assert found.last_used_at in (model.used_at, self._clock.now)
            model.used_at = found.last_used_at

    def _ended(self, flight: Flight, limits: Limits) -> None:
        expected = self._expected(flight, limits)
        assert flight.result == expected
        session_id = flight.session_id
        if isinstance(expected, ErrorCode):
            self._failures += 1
            if flight.end:
                self._sessions.pop(session_id, None)
        else:
            self._completed += 1
            said = self._said(flight) or ()
            if flight.start:
                self._sessions[session_id] = Open(self._clock.now, flight.tenant)
            if flight.end:
                del self._sessions[session_id]
            else:
                self._sessions[session_id].conversation = said
        if session_id in self._sessions and self._sessions[session_id].tenant == flight.tenant:
            self._sessions[session_id].used_at = self._clock.now

    def _expected(self, flight: Flight, limits: Limits) -> Reply | ErrorCode:
        """What the rules say; where other sessions' turns decide, what they allow."""
        session = self._sessions.get(flight.session_id)
        full = flight.result is ErrorCode.UNAVAILABLE
        if "is taken" in flight.sentence:
            # By a session that was open when the turn came, or whose turns were on their way.
            assert flight.start
            assert limits.tenants[flight.session_id] - {flight.tenant}
            return ErrorCode.INVALID_ARG
        if session is not None and session.tenant != flight.tenant:
            return ErrorCode.INVALID_ARG if flight.start else ErrorCode.NOT_FOUND
        if flight.start and session is None:
            others = (
                limits.surely_open - {flight.session_id},
                limits.perhaps_open - {flight.session_id},
            )
            if full and "sessions are in use" in flight.sentence:
                assert len(others[1]) >= MAX_SESSIONS
                return ErrorCode.UNAVAILABLE
            assert len(others[0]) < MAX_SESSIONS
        if not flight.start and session is None:
            return ErrorCode.NOT_FOUND
        if flight.operation.fork is not None:
            source = self._sessions.get(flight.operation.fork)
            if source is None or source.tenant != flight.tenant:
                return ErrorCode.NOT_FOUND
        said = self._said(flight)
        if said is None:
            return ErrorCode.INVALID_ARG
        if flight.talk.says_nothing and not flight.operation.regenerate:
            return self._expected_of_nothing(flight)
        reply = self._oracle.reply(said)
        if isinstance(reply, ErrorCode):
            return reply
        if flight.talk.pictures:
            if full:
                assert len(limits.perhaps_held) > ROOM_FOR_PICTURES
                return ErrorCode.UNAVAILABLE
            assert len(limits.surely_held | flight.pictures) <= ROOM_FOR_PICTURES
        if flight.end and flight.talk.text is None and not flight.operation.regenerate:
            return replace(reply, finish_reason="closed")
        if isinstance(flight.result, Reply) and flight.result.finish_reason == "stopped":
            assert flight.may_be_stopped
            return replace(reply, finish_reason="stopped")
        return reply

    def _said(self, flight: Flight) -> Conversation | None:
        """What is said in its session behind a turn that completes; None where it cannot."""
        talk, source = flight.talk, flight.operation.fork
        session = self._sessions.get(flight.session_id if source is None else source)
        new = flight.start and source is None
        if new or session is None:
            return (talk.opening if talk.says_nothing else talk,)
        before = session.conversation
        left = gone_back(before, flight.operation)
        if left is None:
            return None
        if flight.operation.regenerate:
            question = [each for each in talks_of(before) if each.text is not None][-1]
            return (*left, replace(talk, text=question.text, pictures=question.pictures))
        return left if talk.says_nothing else (*left, talk)

    @staticmethod
    def _expected_of_nothing(flight: Flight) -> Reply | ErrorCode:
        if not (flight.start or flight.end or flight.operation != NO_OPERATION):
            return ErrorCode.INVALID_ARG
        assert isinstance(flight.result, Reply)
        new = flight.start and flight.operation.fork is None
        length = 0 if new else flight.result.num_input_tokens
        forgotten = 0 if new else flight.result.num_forgotten_turns
        return Reply("", "closed" if flight.end else "prefilled", length, 0, forgotten)


@contextmanager
def tight_and_quiet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[tuple[EngineHarness, EngineHarness]]:
    """An engine with little room for anything, and a quiet one for right answers.

    Args:
        folder: for their checkpoint.
        monkeypatch: sets how long tests wait.
        **options: of the first one.
    """
    monkeypatch.setattr(tests.engine_harness, "PATIENCE_SECONDS", HANG_SECONDS)
    checkpoint = tiny_llava(folder / "tiny", text="qwen2", kv_heads=1, image_size=112, seed=5)
    quiet = EngineHarness(checkpoint)
    picture_bytes = quiet.features(PICTURES)[0].nbytes
    pool: dict[str, Any] = {
        "kv_cache_bytes": POOL_BLOCKS * quiet.runner.block_bytes,
        "prefill_chunk_tokens": 32,
    }
    quiet.shutdown()
    quiet = EngineHarness(checkpoint, **pool)
    tight = EngineHarness(
        checkpoint,
        **pool,
        max_sessions=MAX_SESSIONS,
        session_idle_seconds=IDLE_SECONDS,
        session_lifetime_seconds=LIFETIME_SECONDS,
        image_features_bytes=PICTURES_ON_DEVICE * picture_bytes,
        host_cache_bytes=PICTURES_ON_HOST * picture_bytes,
        **options,
    )
    yield tight, quiet
    tight.shutdown()
    quiet.shutdown()


@pytest.fixture(params=[1, 2], ids=["one step at a time", "one step ahead"])
def engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[EngineHarness, EngineHarness]]:
    """Without a journal."""
    with tight_and_quiet(tmp_path, monkeypatch, steps_at_once=request.param) as both:
        yield both


def test_random_operations(
    engines: tuple[EngineHarness, EngineHarness], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "llava_triton")  # the device fails on purpose
    tight, quiet = engines
    oracle = Oracle(quiet)
    machine: Any = functools.partial(EngineMachine, tight, oracle)
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS),
    )
