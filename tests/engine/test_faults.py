"""Steps that fail, turns that are withdrawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from llava_triton.contract.errors import ErrorCode
from llava_triton.engine import engine as engine_module
from llava_triton.engine.session import Session
from llava_triton.engine.state import EngineState
from llava_triton.engine.step_parts import step_part
from llava_triton.model.step import LaunchedStep, Step, StepPart
from tests.small_engine import (
    HANG_SECONDS,
    PICTURES,
    Alone,
    Ask,
    Start,
    failure,
    long_ask,
    show,
)

# Steps that fail.


def test_turns_of_a_failing_step_are_tried_alone(start: Start, alone: Alone) -> None:
    harness = start()
    names = ("red", "green", "star")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
    going_on = Ask("Go on", max_tokens=60, ignore_eos=True)
    with harness.failing_step(turns=len(names)) as step:
        turns = {name: going_on.submit(harness, name) for name in names}
        answers = {name: turn.wait()[0] for name, turn in turns.items()}
    assert step.turns == len(names)
    assert answers == {name: alone(long_ask(name), going_on)[-1] for name in names}
    assert harness.engine.statistics().turns_failed == 0


def test_a_failing_step_of_one_turn_fails_it(start: Start, alone: Alone) -> None:
    harness = start()
    opening = show(0)
    opening.wait(harness, "s", start=True)
    with harness.failing_step() as step:
        assert failure(show(1).submit(harness, "s")) is ErrorCode.INTERNAL
    assert step.turns == 1
    assert (
        Ask("?", (PICTURES[2],)).wait(harness, "s")[0]
        == alone(opening, Ask("?", (PICTURES[2],)))[-1]
    )
    assert harness.engine.statistics().images == 2


def test_where_the_device_is_lost_the_process_ends(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would answer every turn with an error until somebody starts it anew."""
    harness = start()
    ended: list[int] = []
    monkeypatch.setattr(engine_module, "is_lost", lambda device: True)
    monkeypatch.setattr("llava_triton.engine.engine.os._exit", ended.append)
    with harness.failing_step():
        assert failure(show(0).submit(harness, "s", start=True)) is ErrorCode.INTERNAL
    assert ended == [1]


def test_nothing_is_built_on_a_lost_step(start: Start, alone: Alone) -> None:
    """The step behind the lost one is still computed when the engine plans again."""
    harness = start()
    names = ("red", "green")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
    launch, launches = harness.runner.launch, itertools.count()

    def planned(state: EngineState) -> bool:
        return state.steps_in_flight == harness.runner.steps_at_once

    def noticed(state: EngineState) -> bool:
        return state.steps_lost > 0 or state.to_try_alone > 0

    def losing(step: Step) -> LaunchedStep:
        number = next(launches)
        if number == 5:
            while not harness.inspect(planned):
                pass
            raise RuntimeError("the device lost a bit")
        while number == 6 and not harness.inspect(noticed):
            pass
        harness.inspect(lambda _: None)  # it has planned meanwhile what it wanted to
        return launch(step)

    harness.runner.launch = losing  # type: ignore[method-assign]
    going_on = Ask("Go on", max_tokens=60, ignore_eos=True)
    turns = {name: going_on.submit(harness, name) for name in names}
    answers = {name: turn.wait()[0] for name, turn in turns.items()}
    assert answers == {name: alone(long_ask(name), going_on)[-1] for name in names}
    assert next(launches) > 6


# Turns of one session among one another.


@pytest.mark.parametrize("images", [(), (PICTURES[0],)], ids=["text", "picture"])
def test_a_cancelled_end_waits_for_the_turn_before_it(
    start: Start,
    alone: Alone,
    images: tuple[Image.Image, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.engine_harness.PATIENCE_SECONDS", HANG_SECONDS)
    harness = start()
    long = Ask("Go on", images, max_tokens=300, ignore_eos=True)
    running = long.submit(harness, "s", start=True)
    next(running.deltas())
    ending = Ask("Bye").submit(harness, "s", end=True)
    harness.engine.cancel(ending.id)
    assert failure(ending) is ErrorCode.CANCELLED
    harness.check_state()
    assert running.wait()[1].finish_reason == "length"
    assert Ask("?").wait(harness, "other", start=True)[0] == alone(Ask("?"))[0]
    assert failure(Ask("?").submit(harness, "s")) is ErrorCode.NOT_FOUND
    harness.engine.close("other")
    harness.assert_nothing_is_held()


def test_every_turn_has_one_outcome(start: Start) -> None:
    """Also an END that is cancelled, though something ends the session in its place."""
    harness = start()
    running = Ask("Go on", max_tokens=300, ignore_eos=True).submit(harness, "s", start=True)
    next(running.deltas())
    ending = Ask("Bye").submit(harness, "s", end=True)
    harness.engine.cancel(ending.id)
    assert failure(ending) is ErrorCode.CANCELLED
    running.wait()
    assert failure(Ask("?").submit(harness, "s")) is ErrorCode.NOT_FOUND
    now = harness.engine.statistics()
    assert (now.turns_completed, now.turns_cancelled) == (1, 1)
    assert (now.turns_refused, now.turns_failed) == (1, 0)


def test_a_step_that_cannot_be_planned_fails_its_turn(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.engine_harness.PATIENCE_SECONDS", HANG_SECONDS)
    harness = start()
    for name in ("bad", "good"):
        long_ask(name).wait(harness, name, start=True)
    plan = step_part

    def planned(ids: Sequence[int], session: Session, *rest: Any) -> StepPart:
        if session.id == "bad":
            raise RuntimeError("a fault of ours")
        return plan(ids, session, *rest)

    going_on = Ask("Go on", max_tokens=60, ignore_eos=True)
    with monkeypatch.context() as fault:
        fault.setattr(engine_module, "step_part", planned)
        turns = {name: going_on.submit(harness, name) for name in ("good", "bad")}
        assert failure(turns["bad"]) is ErrorCode.INTERNAL
        assert turns["good"].wait()[0] == alone(long_ask("good"), going_on)[-1]
    harness.check_state()
    assert going_on.wait(harness, "bad")[0] == alone(long_ask("bad"), going_on)[-1]
