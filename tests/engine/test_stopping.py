"""Answers that a client stops and keeps."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future

import pytest

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.operations import Operation
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.engine.session import SessionId
from llava_triton.engine.state import EngineState
from llava_triton.model.device_threads import DeviceThreads, Done
from llava_triton.model.step import Step, StepResult
from tests.engine_harness import EngineHarness
from tests.small_engine import HANG_SECONDS, PICTURES, Alone, Ask, Start

LONG = Ask("What is it?", (PICTURES[0],), max_tokens=600, ignore_eos=True)
LATER = Ask("Why so?")


def stop(
    harness: EngineHarness, session_id: SessionId, tenant: str = NO_TENANT
) -> Delta | SessionError:
    told: queue.SimpleQueue[Delta | SessionError] = queue.SimpleQueue()
    harness.engine.stop_answer(session_id, tenant, told.put)
    return told.get(timeout=HANG_SECONDS)


def test_what_was_said_is_kept(start: Start, alone: Alone) -> None:
    harness = start()
    running = LONG.submit(harness, "s", start=True)
    pieces = running.deltas()
    said = next(pieces).text
    told = stop(harness, "s")
    rest = list(pieces)
    said += "".join(piece.text for piece in rest)
    final = rest[-1]
    assert final.finish_reason == "stopped"
    assert 0 < final.num_output_tokens < 600
    assert isinstance(told, Delta)
    assert (told.text, told.finish_reason) == ("", "stopped")
    assert told.num_output_tokens == final.num_output_tokens
    # As if no more had been wanted from the beginning.
    short = Ask(LONG.text, LONG.images, final.num_output_tokens, ignore_eos=True)
    assert [said, LATER.wait(harness, "s")[0]] == alone(short, LATER)
    # A completed turn: the session can go back to it, and before it.
    harness.ask("s", operation=Operation(rewind=1))
    text, final = LATER.wait(harness, "s")
    assert text == alone(short, LATER)[-1]
    assert final.num_cached_tokens >= len(said.split())
    harness.ask("s", operation=Operation(rewind=0))
    assert harness.engine.statistics().images == 0


def test_a_token_that_nobody_has_heard_of_is_kept_and_told(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was computed just before the stop."""
    given, back = list[Step](), list[Future[StepResult]]()
    compute = DeviceThreads.compute

    def counted(device: DeviceThreads, step: Step, done: Done) -> None:
        given.append(step)

        def told(result: Future[StepResult]) -> None:
            done(result)
            back.append(result)

        compute(device, step, told)

    monkeypatch.setattr(DeviceThreads, "compute", counted)
    harness = start()
    running = LONG.submit(harness, "s", start=True)
    pieces = running.deltas()
    text = next(pieces).text
    engine, deadline = harness.engine, time.monotonic() + HANG_SECONDS
    waits, go_on = threading.Event(), threading.Event()

    def wait(_: EngineState) -> None:
        waits.set()
        assert go_on.wait(HANG_SECONDS)

    engine.inspect(wait)
    assert waits.wait(HANG_SECONDS)
    while len(back) < len(given):  # until a step is computed
        assert time.monotonic() < deadline
    engine.stop_answer("s", NO_TENANT, lambda _: None)
    go_on.set()
    rest = list(pieces)
    text += "".join(piece.text for piece in rest)
    short = Ask(LONG.text, LONG.images, rest[-1].num_output_tokens, ignore_eos=True)
    assert [text, LATER.wait(harness, "s")[0]] == alone(short, LATER)


def test_an_answer_that_has_not_begun_is_kept_as_an_empty_one(start: Start, alone: Alone) -> None:
    harness = start()
    with harness.held_device() as device:
        running = LONG.submit(harness, "s", start=True)
        device.wait_until_busy()
        waiting = LATER.submit(harness, "s")
        stop(harness, "s")
        text, final = running.wait()
    assert (text, final.finish_reason, final.num_output_tokens) == ("", "stopped", 0)
    waiting.wait()
    assert len(harness.session("s").turns) == 2
    harness.ask("s", operation=Operation(rewind=1))
    text, _ = harness.ask("s", operation=Operation(regenerate=True), max_tokens=20)
    assert text == alone(Ask(LONG.text, LONG.images))[0]


def test_a_stopped_turn_that_took_back_an_answer_takes_its_place(
    start: Start, alone: Alone
) -> None:
    harness = start()
    Ask(LONG.text, LONG.images).wait(harness, "s", start=True)
    again = harness.submit(
        "s", operation=Operation(regenerate=True), max_tokens=600, ignore_eos=True
    )
    next(again.deltas())
    stop(harness, "s")
    _, final = again.wait()
    short = Ask(LONG.text, LONG.images, final.num_output_tokens, ignore_eos=True)
    assert LATER.wait(harness, "s")[0] == alone(short, LATER)[-1]


def test_only_the_running_turn_is_stopped(start: Start, alone: Alone) -> None:
    harness = start()
    running = LONG.submit(harness, "s", start=True)
    next(running.deltas())
    waiting = LATER.submit(harness, "s")
    other = LATER.submit(harness, "other", start=True)
    stop(harness, "s")
    _, final = running.wait()
    short = Ask(LONG.text, LONG.images, final.num_output_tokens, ignore_eos=True)
    assert waiting.wait()[0] == alone(short, LATER)[-1]
    assert other.wait()[0] == alone(LATER)[0]


def test_a_stopped_end_ends_its_session(start: Start) -> None:
    harness = start()
    running = LONG.submit(harness, "s", start=True, end=True)
    next(running.deltas())
    stop(harness, "s")
    running.wait()
    harness.assert_nothing_is_held()


def test_nothing_to_stop_changes_nothing(start: Start, alone: Alone) -> None:
    harness = start()
    short = Ask(LONG.text, LONG.images)
    short.wait(harness, "s", start=True)
    assert stop(harness, "s") == Delta("", "stopped", 0, 0, 0, 0.0)
    with harness.held_device() as device:  # pictures alone are no answer
        shown = harness.submit("s", images=PICTURES[1:2])
        device.wait_until_busy()
        stop(harness, "s")
    assert shown.wait()[1].finish_reason == "prefilled"
    assert LATER.wait(harness, "s")[0] == alone(short, Ask(None, (PICTURES[1],)), LATER)[-1]


@pytest.mark.parametrize("session_id", ["s", "no such session"])
def test_who_does_not_have_a_session_does_not_stop_it(start: Start, session_id: str) -> None:
    harness = start()
    running = LONG.submit(harness, "s", start=True, tenant="alice")
    next(running.deltas())
    told = stop(harness, session_id, tenant="bob")
    assert isinstance(told, SessionError)
    assert told.code is ErrorCode.NOT_FOUND
    harness.engine.cancel(running.id)


def cancel(
    harness: EngineHarness, session_id: SessionId, request_id: str, tenant: str = NO_TENANT
) -> Delta | SessionError:
    told: queue.SimpleQueue[Delta | SessionError] = queue.SimpleQueue()
    harness.engine.cancel_answer(session_id, tenant, request_id, told.put)
    return told.get(timeout=HANG_SECONDS)


def test_a_turn_is_cancelled_by_its_request(start: Start, alone: Alone) -> None:
    """The one that runs, or one that waits; nobody else's, and none of another name."""
    harness = start()
    first = Ask("What is it?", (PICTURES[0],))
    texts = [first.wait(harness, "s", start=True)[0]]
    running = LONG.submit(harness, "s", request_id="1")
    pieces = running.deltas()
    next(pieces)
    waiting = LATER.submit(harness, "s", request_id="2")
    for request_id, tenant in (("3", NO_TENANT), ("1", "somebody")):
        cancel(harness, "s", request_id, tenant)
        assert harness.engine.statistics().turns_cancelled == 0
    assert cancel(harness, "nowhere", "1") == Delta("", "stopped", 0, 0, 0, 0.0)
    for request_id, turn in (("2", waiting), ("1", running)):
        cancel(harness, "s", request_id)
        with pytest.raises(SessionError) as caught:
            turn.wait()
        assert caught.value.code is ErrorCode.CANCELLED
    texts.append(LATER.wait(harness, "s")[0])
    assert texts == alone(first, LATER)
