"""Answers that must be there in time: `max_seconds`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.model.step import LaunchedStep, Step
from tests.engine.test_engine import DEMO, QUESTIONS, picture
from tests.engine_harness import EngineHarness, Pending

PAST_TURN_LIMIT = 0.3


@pytest.fixture
def harness() -> Iterator[EngineHarness]:
    harness = EngineHarness(DEMO)
    yield harness
    harness.shutdown()


def refused(pending: Pending) -> SessionError:
    with pytest.raises(SessionError) as told:
        pending.wait()
    assert told.value.code is ErrorCode.UNAVAILABLE
    assert "max_seconds" in told.value.sentence
    return told.value


def test_an_answer_is_cut_and_the_conversation_goes_on(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = harness.runner.launch

    def slow(step: Step) -> LaunchedStep:
        time.sleep(0.1)  # the device's own time, not a wait: the context must last for the limit
        return launch(step)

    monkeypatch.setattr(harness.runner, "launch", slow)
    limits: dict[str, Any] = {"max_tokens": 10_000, "ignore_eos": True, "max_seconds": 5.0}
    text, final = harness.ask("s", QUESTIONS[1], [picture("red")], start=True, **limits)
    assert final.finish_reason == "time_limit"
    assert 0 < final.num_output_tokens < 100
    _, after = harness.ask("s", QUESTIONS[2])
    assert after.finish_reason in ("stop", "length")
    # The answer that was cut is part of the conversation, as far as it was told.
    assert after.num_cached_tokens >= final.num_input_tokens
    assert text.split()[0]
    harness.ask("s", end=True)
    harness.assert_nothing_is_held()
    assert harness.engine.statistics().turns_completed == 3


def test_an_answer_in_time_is_whole(harness: EngineHarness) -> None:
    plain = harness.ask("s", QUESTIONS[1], [picture("red")], start=True)
    limited = harness.ask("t", QUESTIONS[1], [picture("red")], start=True, max_seconds=1000)
    assert limited[0] == plain[0]
    assert limited[1].finish_reason == plain[1].finish_reason


def test_turns_that_do_not_begin_in_time_are_refused(harness: EngineHarness) -> None:
    first, _ = harness.ask("s", QUESTIONS[0], [picture("red")], start=True)
    with harness.held_device() as device:
        running = harness.submit("s", QUESTIONS[1], max_seconds=PAST_TURN_LIMIT)
        device.wait_until_busy()
        waiting = harness.submit("t", QUESTIONS[1], start=True, max_tokens=4)
        behind = harness.submit("t", QUESTIONS[2], max_seconds=PAST_TURN_LIMIT)
        ending = harness.submit("t", QUESTIONS[2], end=True, max_seconds=PAST_TURN_LIMIT)
        for pending in (running, behind, ending):  # though the device is busy
            refused(pending)
    waiting.wait()
    with pytest.raises(SessionError, match="unknown or has expired"):
        harness.ask("t", QUESTIONS[2])  # its END counted all the same
    assert harness.ask("s", QUESTIONS[0])[0]
    harness.ask("s", end=True)
    harness.assert_nothing_is_held()
    assert first
