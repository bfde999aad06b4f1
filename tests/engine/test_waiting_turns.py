"""Turns that wait: how many may, what they hold, and who prepares them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.conversation.prompt import Prompt
from llava_triton.conversation.renderer import ConversationRenderer
from llava_triton.engine import preparation
from tests.engine_harness import EngineHarness, Pending
from tests.small_engine import HANG_SECONDS, PICTURES, Alone, Ask, Start, failure, show

HELLO = Ask("Hello!", max_tokens=3)


def outcome(pending: Pending) -> str:
    """How a turn ended: its finish reason, or its error's sentence."""
    try:
        return pending.wait()[1].finish_reason
    except SessionError as error:
        return error.sentence


# How many.


@pytest.mark.parametrize(
    "flags",
    [{"start": True, "end": True}, {"start": True}, {}, {"end": True}],
    ids=["whole sessions", "openings", "turns", "ends"],
)
def test_one_session_cannot_take_the_places_of_all_others(
    start: Start, flags: dict[str, bool]
) -> None:
    harness = start(max_queued_turns=8, max_queued_turns_per_session=4)
    with harness.held_device() as device:
        running = HELLO.submit(harness, "busy", start=True)
        device.wait_until_busy()
        many = [HELLO.submit(harness, "busy", **flags) for _ in range(100)]
        others = [HELLO.submit(harness, name, start=True) for name in ("b", "c")]
        refused = [failure(pending) for pending in many[4:]]
        assert set(refused) == {ErrorCode.UNAVAILABLE}
        assert not device.going
        assert harness.engine.statistics().turns_in_flight <= 8
    assert outcome(running) == "length"
    assert [outcome(each) for each in others] == ["length", "length"]
    said = [outcome(pending) for pending in many[:4]]
    assert said[3] == "4 turns of this session are waiting already; wait for their answers"
    assert "length" in said


def test_only_an_end_that_frees_something_is_taken_where_all_places_are(start: Start) -> None:
    harness = start(max_queued_turns=2)
    for name in ("full", "empty end", "said end", "opened anew"):
        HELLO.wait(harness, name, start=True)
    with harness.held_device() as device:
        running = [HELLO.submit(harness, "full") for _ in range(2)]
        device.wait_until_busy()
        refused = {
            "a turn": HELLO.submit(harness, "empty end"),
            "an end of nothing": harness.submit("nobody", end=True),
            "an end that asks": HELLO.submit(harness, "said end", end=True),
            "a whole session": HELLO.submit(harness, "opened anew", start=True, end=True),
        }
        for name, pending in refused.items():
            assert failure(pending) is ErrorCode.UNAVAILABLE, name
        assert harness.submit("empty end", end=True).wait()[1].finish_reason == "closed"
        # A second one would have nothing to end.
        closing = harness.submit("full", end=True)
        assert failure(harness.submit("full", end=True)) is ErrorCode.UNAVAILABLE
        assert not device.going
    assert [outcome(each) for each in (*running, closing)] == ["length", "length", "closed"]
    # Triton has ended their sequences, although the turns were refused.
    harness.assert_nothing_is_held()


# What they hold.


def test_features_of_waiting_turns_have_a_budget(start: Start, alone: Alone) -> None:
    (features,) = start().features(PICTURES[:1])
    harness = start(max_queued_features_bytes=6 * features.nbytes)
    with harness.held_device() as device:
        running = show(0).submit(harness, "s", start=True)
        device.wait_until_busy()
        waiting = [show(number).submit(harness, "s") for number in (1, 2, 3)]
        with pytest.raises(SessionError, match="pictures of waiting turns is full") as caught:
            show(4).wait(harness, "s")
        assert caught.value.code is ErrorCode.UNAVAILABLE
        text_only = Ask("?").submit(harness, "s")
        other = show(5).submit(harness, "other", start=True)  # waits for nobody
        assert harness.inspect(lambda state: state.lanes.features_bytes) <= 6 * features.nbytes
    for pending in (running, *waiting, text_only):
        pending.wait()
    assert other.wait()[0] == alone(show(5))[0]
    assert harness.inspect(lambda state: state.lanes.features_bytes) == 0


def test_a_turn_larger_than_the_budget_is_taken_where_none_waits(start: Start) -> None:
    harness = start(max_queued_features_bytes=1)
    assert Ask("?", tuple(PICTURES[:4])).wait(harness, "s", start=True)[0]


# Who prepares them.


@contextmanager
def held_preparation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A long text is not made tokens of before the block ends; waits until one is tried."""
    most = 50
    message, tried, may = ConversationRenderer.message, threading.Event(), threading.Event()

    def held(renderer: ConversationRenderer, last: Any, text: str | None, *images: Any) -> Prompt:
        if len(text or "") > most:
            tried.set()
            assert may.wait(HANG_SECONDS)
        return message(renderer, last, text, *images)

    def wait_until_tried() -> None:
        assert tried.wait(HANG_SECONDS)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "SHORT_TEXT_CHARACTERS", most)
        patch.setattr(ConversationRenderer, "message", held)
        try:
            yield wait_until_tried
        finally:
            may.set()


LONG = Ask("word " * 20, max_tokens=3)


def test_nobody_waits_for_another_s_long_text(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()
    HELLO.wait(harness, "s", start=True)
    with held_preparation(monkeypatch) as wait_until_tried:
        long = LONG.submit(harness, "s")
        wait_until_tried()
        behind = HELLO.submit(harness, "s")
        assert HELLO.wait(harness, "other", start=True)[0] == alone(HELLO)[0]
        assert long.events.empty()
        assert behind.events.empty()
        harness.check_state()
    answers = [long.wait()[0], behind.wait()[0]]
    assert answers == alone(HELLO, LONG, HELLO)[1:]


def test_a_turn_that_is_being_prepared_can_be_withdrawn(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()
    HELLO.wait(harness, "s", start=True)
    with held_preparation(monkeypatch) as wait_until_tried:
        long = LONG.submit(harness, "s")
        wait_until_tried()
        harness.engine.cancel(long.id)
        assert failure(long) is ErrorCode.CANCELLED
        assert HELLO.wait(harness, "s")[0] == alone(HELLO, HELLO)[-1]
        opening = LONG.submit(harness, "new", start=True)
        harness.engine.close("new")
        assert failure(opening) is ErrorCode.CANCELLED
    harness.engine.close("s")
    harness.assert_nothing_is_held()


def test_a_shutdown_waits_for_no_preparation(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = EngineHarness(checkpoint)
    with held_preparation(monkeypatch) as wait_until_tried:
        long = LONG.submit(harness, "s", start=True)
        wait_until_tried()
        stopping = threading.Thread(target=harness.shutdown)
        stopping.start()
        assert failure(long) is ErrorCode.UNAVAILABLE
    stopping.join(HANG_SECONDS)
    assert not stopping.is_alive()


def test_a_text_that_can_never_fit_is_not_made_tokens_of(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()

    def never(*_: object) -> list[int]:
        raise AssertionError("it was tokenized")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", never)
        for text in ("many words " * 20_000, " " * 200_000, "é" * 100_000):
            with pytest.raises(SessionError, match="would be at least") as caught:
                Ask(text).wait(harness, "s", start=True)
            assert caught.value.code is ErrorCode.INVALID_ARG


# Room for one more.


def test_who_asks_for_room_waits_for_nobody(start: Start) -> None:
    harness = start(max_sessions=1)
    engine = harness.engine
    assert engine.room_for_a_session("s") is None
    HELLO.wait(harness, "s", start=True)
    assert engine.room_for_a_session("s") is None  # its own place
    released = threading.Event()
    harness.engine.inspect(lambda _: released.wait(HANG_SECONDS))
    try:
        full = engine.room_for_a_session("other")
    finally:
        released.set()
    assert full is not None
    assert full.code is ErrorCode.UNAVAILABLE
    assert "all 1 sessions are in use" in full.sentence
    harness.engine.close("s")
    assert harness.inspect(lambda _: engine.room_for_a_session("other")) is None


# Sessions that the engine ends.


def test_idle_time_begins_when_an_answer_ends(start: Start) -> None:
    harness = start(session_idle_seconds=100.0)
    with harness.held_device() as device:
        running = HELLO.submit(harness, "s", start=True)
        device.wait_until_busy()
        harness.clock.now += 350.0
        harness.inspect(lambda state: state.sessions.expire(state.lanes))
    running.wait()
    harness.clock.now += 99.0
    HELLO.wait(harness, "s")
    assert harness.expired == []
    harness.clock.now += 100.0
    harness.inspect(lambda state: state.sessions.expire(state.lanes))
    assert harness.expired == ["s"]
    assert failure(HELLO.submit(harness, "s")) is ErrorCode.NOT_FOUND


@pytest.mark.parametrize("share", [True, False])
def test_a_turn_outlives_its_session_s_time(start: Start, alone: Alone, share: bool) -> None:
    """Whoever asks for the session meanwhile ends it no more than the sweep does."""
    asked = Ask("a b c d e f g h " * 4, max_tokens=60, ignore_eos=True)
    harness = start(session_lifetime_seconds=100.0, cache_freed_blocks=share)
    with harness.held_device() as device:
        running = asked.submit(harness, "s", start=True)
        device.wait_until_busy()
        harness.clock.now += 150.0
        assert harness.engine.knows("s")
        stranger = harness.submit("s", "?", tenant="another")
        waiting = HELLO.submit(harness, "s")
        assert failure(stranger) is ErrorCode.NOT_FOUND
        harness.check_state()
    assert running.wait()[0] == alone(asked)[0]
    assert failure(waiting) is ErrorCode.NOT_FOUND
    assert harness.expired == ["s"]
    assert asked.wait(harness, "again", start=True, end=True)[0] == alone(asked)[0]
    harness.assert_nothing_is_held()


def test_whoever_ended_a_session_is_not_told_that_it_has_expired(start: Start) -> None:
    harness = start(session_idle_seconds=100.0)
    for name in ("ended", "closed", "opened anew"):
        HELLO.wait(harness, name, start=True)
    harness.submit("ended", end=True).wait()
    harness.engine.close("closed")
    HELLO.wait(harness, "opened anew", start=True)
    assert harness.expired == []
    harness.clock.now += 100.0
    HELLO.wait(harness, "opened anew", start=True)  # its time was over: it told so before
    assert harness.expired == ["opened anew"]
