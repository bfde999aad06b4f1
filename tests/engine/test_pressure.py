"""What gives way when memory or time is short."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.engine.session import Session, SessionId
from llava_triton.engine.state import EngineState
from llava_triton.kernels.base import BLOCK_TOKENS
from tests.engine_harness import EngineHarness
from tests.small_engine import (
    PICTURES,
    Alone,
    Ask,
    Start,
    blocks_of,
    failure,
    long_ask,
    on_host,
    resident,
    show,
)


def put_back(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> list[SessionId]:
    """Sessions that lose their blocks while they have a turn, as it happens."""
    ids: list[SessionId] = []

    def spy(state: EngineState) -> None:
        evict = state.memory.evict

        def counted(session: Session) -> None:
            if session.id in state.lanes:
                ids.append(session.id)
            evict(session)

        monkeypatch.setattr(state.memory, "evict", counted)

    harness.inspect(spy)
    return ids


# Keys and values under pressure.


def test_idle_sessions_leave_longest_unused_first(start: Start, quiet: EngineHarness) -> None:
    size = blocks_of(long_ask("red").wait(quiet, "size", start=True)[1])
    harness = start(blocks=3 * size + 1)
    for name in ("red", "green", "star"):
        long_ask(name).wait(harness, name, start=True)
    Ask("?", max_tokens=1).wait(harness, "red")
    assert resident(harness) == {"red", "green", "star"}
    long_ask("left").wait(harness, "left", start=True)
    assert resident(harness) == {"red", "star", "left"}
    assert on_host(harness) == {"green"}
    long_ask("large").wait(harness, "large", start=True)
    assert resident(harness) == {"red", "left", "large"}
    Ask("?", max_tokens=1).wait(harness, "green")
    assert resident(harness) == {"left", "large", "green"}
    assert on_host(harness) == {"red", "star"}


def test_the_oldest_copy_in_host_memory_is_dropped_first(
    start: Start, quiet: EngineHarness, alone: Alone
) -> None:
    size = blocks_of(long_ask("red").wait(quiet, "size", start=True)[1])
    harness = start(host_blocks=2 * size + 1)
    names = ("red", "green", "star")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
        harness.evict_idle(name)
    harness.poison_free_blocks()
    assert on_host(harness) == {"green", "star"}
    for name in names:
        assert Ask("?").wait(harness, name)[0] == alone(long_ask(name), Ask("?"))[-1]
    now = harness.engine.statistics()
    assert (now.evicted_to_host, now.evicted_by_dropping) == (3, 1)
    assert (now.restored_from_host, now.restored_by_computing) == (2, 1)
    assert now.host_bytes == 0


@pytest.mark.parametrize("host_blocks", [0, 1000])
def test_a_turn_never_fails_for_memory_that_idle_sessions_hold(
    start: Start, alone: Alone, host_blocks: int
) -> None:
    harness = start(blocks=24, host_blocks=host_blocks)
    names = ("red", "green", "star")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
    greedy = Ask("Tell me everything.", (PICTURES[0],), max_tokens=1000, ignore_eos=True)
    text, final = greedy.wait(harness, "greedy", start=True)
    assert final.num_input_tokens + final.num_output_tokens == 24 * BLOCK_TOKENS
    assert resident(harness) == {"greedy"}
    whole = Ask(greedy.text, greedy.images, final.num_output_tokens, ignore_eos=True)
    assert [text] == alone(whole)
    for name in names:
        assert Ask("?").wait(harness, name)[0] == alone(long_ask(name), Ask("?"))[-1]


@pytest.mark.parametrize("host_blocks", [0, 1000])
def test_long_turns_that_do_not_fit_together_all_finish(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch, host_blocks: int
) -> None:
    asks = {
        name: Ask(f"{name} {name}", (PICTURES[number],), max_tokens=250, ignore_eos=True)
        for number, name in enumerate(("red", "green", "star"))
    }
    harness = start(blocks=30, host_blocks=host_blocks, prefill_chunk_tokens=16)
    victims = put_back(harness, monkeypatch)
    with harness.held_device():  # until all of them are there
        turns = {name: ask.submit(harness, name, start=True) for name, ask in asks.items()}
    answers = {name: turn.wait()[0] for name, turn in turns.items()}
    assert answers == {name: alone(ask)[0] for name, ask in asks.items()}
    assert victims
    assert "red" not in victims  # the oldest turn always goes on
    now = harness.engine.statistics()
    if host_blocks:
        assert now.restored_from_host > 0
    else:
        assert now.restored_by_computing > 0


def test_a_turn_that_was_put_back_can_be_cancelled(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start(blocks=24)
    victims = put_back(harness, monkeypatch)
    opening = Ask("new new", (PICTURES[1],))
    opening.wait(harness, "new", start=True)
    with harness.held_device():
        oldest = Ask("old old", max_tokens=330, ignore_eos=True).submit(harness, "old", start=True)
        younger = Ask("go on", max_tokens=200, ignore_eos=True).submit(harness, "new")
    while "new" not in victims:
        assert not younger.events.get(timeout=60).is_final  # type: ignore[union-attr]
    harness.engine.cancel(younger.id)
    assert failure(younger) is ErrorCode.CANCELLED
    assert oldest.wait()[1].finish_reason == "length"
    assert Ask("And now?").wait(harness, "new")[0] == alone(opening, Ask("And now?"))[-1]


def test_what_a_turn_computed_itself_is_not_called_cached(
    start: Start, quiet: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it was put back in the middle of its prompt."""
    long = Ask("new " * 150, max_tokens=4, ignore_eos=True)
    prompt = long.wait(quiet, "size", start=True)[1].num_input_tokens
    harness = start(blocks=prompt // BLOCK_TOKENS + 5, prefill_chunk_tokens=1)
    victims = put_back(harness, monkeypatch)
    with harness.held_device():
        oldest = Ask("old", max_tokens=120, ignore_eos=True).submit(harness, "old", start=True)
        younger = long.submit(harness, "new", start=True)
    oldest.wait()
    _, final = younger.wait()
    assert "new" in victims
    assert final.num_cached_tokens == 0
    now = harness.engine.statistics()
    assert (now.prompt_tokens_reused, now.prefix_cache_blocks) == (0, 0)


def test_a_copy_to_host_memory_that_fails_is_nobody_elses_business(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()
    for name in ("red", "green"):
        long_ask(name).wait(harness, name, start=True)

    def broken(blocks: Sequence[int]) -> None:
        raise MemoryError("no host memory")

    with monkeypatch.context() as patch:
        patch.setattr(harness.runner.pages, "to_host", broken)
        harness.evict_idle("red")
        harness.poison_free_blocks()
        Ask("a step in which the copy fails").wait(harness, "new", start=True)
    with harness.held_device() as device:
        blocker = Ask("wait").submit(harness, "blocker", start=True)
        device.wait_until_busy()
        turns = {name: Ask("?").submit(harness, name) for name in ("red", "green")}
        device.go_on()
        blocker.wait()
        assert turns["green"].wait()[0] == alone(long_ask("green"), Ask("?"))[-1]
        try:
            text = turns["red"].wait()[0]
        except SessionError as error:
            assert error.code is ErrorCode.INTERNAL  # noqa: PT017
            text = Ask("?").wait(harness, "red")[0]
        assert text == alone(long_ask("red"), Ask("?"))[-1]


# Pictures under pressure.


def fill(harness: EngineHarness) -> None:
    """Four sessions, each with a picture of its own: two on the device, two on the host."""
    for number in range(4):
        show(number).wait(harness, number, start=True)


def test_pictures_go_to_host_memory_and_only_then_are_new_ones_refused(
    start: Start, alone: Alone
) -> None:
    harness = start(pictures=2, host_pictures=2)
    evicted = []
    for number in range(4):
        show(number).wait(harness, number, start=True)
        evicted.append(harness.engine.statistics().images_evicted)
    assert evicted == [0, 0, 1, 2]
    assert failure(show(4).submit(harness, "new", start=True)) is ErrorCode.UNAVAILABLE
    assert failure(Ask("?").submit(harness, "new")) is ErrorCode.NOT_FOUND
    assert failure(show(4).submit(harness, 0)) is ErrorCode.UNAVAILABLE
    two = Ask("?", (PICTURES[0], PICTURES[5]))
    assert failure(two.submit(harness, 0)) is ErrorCode.UNAVAILABLE
    harness.check_state()
    assert harness.engine.statistics().images == 4
    # What is there already can be shown again, and everybody can go on: also where keys and values
    # have to be computed from features in host memory.
    assert show(0).wait(harness, "same", start=True)[0] == alone(show(0))[0]
    harness.evict_idle()
    for number in range(4):
        assert Ask("?").wait(harness, number)[0] == alone(show(number), Ask("?"))[-1]
    harness.engine.close(1)
    assert show(4).wait(harness, "new", start=True)[0] == alone(show(4))[0]


def test_a_refused_opening_leaves_the_open_session_alone(start: Start, alone: Alone) -> None:
    harness = start(pictures=2, host_pictures=2)
    fill(harness)
    two = Ask("What is it?", (PICTURES[4], PICTURES[5]))
    assert failure(two.submit(harness, 0, start=True)) is ErrorCode.UNAVAILABLE
    assert Ask("?").wait(harness, 0)[0] == alone(show(0), Ask("?"))[-1]


def test_the_longest_unused_picture_goes_first(start: Start) -> None:
    harness = start(pictures=2, host_pictures=2)
    for number in (0, 1):
        show(number).wait(harness, number, start=True)
    show(0).wait(harness, "again", start=True)
    show(2).wait(harness, 2, start=True)
    moved = harness.inspect(lambda state: list(state.images.on_host()))
    assert [image.digest for image in moved] == [harness.session(1).images[0].digest]


def test_a_refused_picture_is_a_refused_turn(start: Start) -> None:
    harness = start(pictures=2, host_pictures=2)
    fill(harness)
    before = harness.engine.statistics()
    failure(show(4).submit(harness, "new", start=True))
    failure(show(4).submit(harness, 0))
    now = harness.engine.statistics()
    assert now.turns_refused - before.turns_refused == 2
    assert now.turns_failed == before.turns_failed
    assert now.sessions_opened == before.sessions_opened


# While the device is busy.


@pytest.mark.parametrize(
    ("code", "turn"),
    [
        pytest.param(ErrorCode.UNAVAILABLE, ("third", Ask("?"), True), id="a session too many"),
        pytest.param(ErrorCode.UNAVAILABLE, ("busy", Ask("?"), False), id="a turn too many"),
        pytest.param(ErrorCode.NOT_FOUND, ("nobody", Ask("?"), False), id="an unknown session"),
        pytest.param(ErrorCode.INVALID_ARG, ("idle", Ask(None), False), id="nothing said"),
        pytest.param(ErrorCode.UNAVAILABLE, ("idle", show(1), False), id="a picture too many"),
    ],
)
def test_refusals_do_not_wait_for_the_device(
    start: Start, code: ErrorCode, turn: tuple[str, Ask, bool]
) -> None:
    session_id, ask, opens = turn
    limits = {"max_sessions": 2} if opens else {}
    harness = start(**limits, max_queued_turns=4, pictures=1, host_blocks=0)
    show(0).wait(harness, "idle", start=True)
    with harness.held_device() as device:
        waiting = [Ask("Hello!").submit(harness, "busy", start=True)]
        device.wait_until_busy()
        waiting += [Ask("And?").submit(harness, "busy") for _ in range(2)]
        if session_id == "busy":
            waiting.append(Ask("And?").submit(harness, "busy"))
        assert failure(ask.submit(harness, session_id, start=opens)) is code
        assert not device.going
    for pending in waiting:
        pending.wait()


def test_a_turn_that_takes_long_gives_signs_of_life(start: Start, alone: Alone) -> None:
    harness = start()
    ask = Ask("How long?", (PICTURES[0],))
    with harness.held_device() as device:
        pending = ask.submit(harness, "s", start=True)
        pieces = pending.deltas()
        signs = [next(pieces) for _ in range(3)]
        assert not device.going
    assert {sign.text for sign in signs} == {""}
    assert not any(sign.is_final for sign in signs)
    assert "".join(piece.text for piece in pieces) == alone(ask)[0]


def test_what_a_turn_put_back_before_its_first_step_was_spared(start: Start) -> None:
    """Its session's blocks went to an older turn: nothing of its prompt is cached any more."""
    harness = start(host_blocks=0, cache_freed_blocks=False)
    long_ask("young").wait(harness, "young", start=True)
    with harness.held_device() as device:
        old = long_ask("old").submit(harness, "old", start=True)
        device.wait_until_busy()
        young = Ask("again", max_tokens=8).submit(harness, "young")

        def put_back(state: EngineState) -> None:
            (turn,) = (each for each in state.running if each.session.id == "young")
            victim = state.scheduler.victim([turn])
            assert victim is turn.session
            state.memory.evict(victim)

        harness.inspect(put_back)
    old.wait()
    assert young.wait()[1].num_cached_tokens == 0
