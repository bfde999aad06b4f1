"""What steps are made of: long prompts in pieces beside running answers, questions whole."""

from __future__ import annotations

import itertools
import math

import pytest

from llava_triton.engine.step_clock import StepClock
from llava_triton.model.device_threads import DeviceThreads, Done
from llava_triton.model.step import LaunchedStep, Step
from tests.engine_harness import EngineHarness, Pending
from tests.small_engine import Ask, Start, long_ask

PATIENT = {"target_between_tokens_ms": 60_000.0}
"""A busy machine takes long between two steps; a question still fits into the time that is left."""
STREAM = Ask("Go on", max_tokens=300, ignore_eos=True)


class Recorder:
    """Keeps every step's numbers of tokens, part by part."""

    def __init__(self, harness: EngineHarness) -> None:
        self._launch = harness.runner.launch
        self.steps: list[list[int]] = []
        harness.runner.launch = self.launch  # type: ignore[method-assign]

    def launch(self, step: Step) -> LaunchedStep:
        self.steps.append([len(part.ids) for part in step.parts])
        return self._launch(step)

    @property
    def beside_answers(self) -> list[int]:
        """Prompt tokens of those steps that advanced at least three answers too."""
        return [sum(step) - step.count(1) for step in self.steps if step.count(1) >= 3]


def streams_and_recorder(harness: EngineHarness) -> tuple[list[Pending], Recorder]:
    """A session to ask, answers that stream beside it, and what their steps are made of."""
    long_ask("red").wait(harness, "asked", start=True)
    streams = [STREAM.submit(harness, name, start=True) for name in ("a", "b", "c", "d")]
    for stream in streams:
        pieces = stream.deltas()
        next(pieces)
        next(pieces)  # of a step behind the opening's own: a question may now be next
    return streams, Recorder(harness)


def has_questions_alone(harness: EngineHarness) -> bool:
    """As on a CPU."""
    return harness.runner.steps_at_once == 1


@pytest.mark.parametrize("text", ["Why so?", "Why so, and what of the circle on the left of it?"])
def test_a_question_is_computed_in_one_step(start: Start, text: str) -> None:
    harness = start(**PATIENT)
    streams, recorder = streams_and_recorder(harness)
    _, final = Ask(text, max_tokens=4).wait(harness, "asked")
    computed = final.num_input_tokens - final.num_cached_tokens
    if has_questions_alone(harness):
        assert [step for step in recorder.steps if max(step) > 1] == [[computed]]
    else:
        assert [count for count in recorder.beside_answers if count] == [computed]
    for stream in streams:
        stream.wait()


def test_running_answers_advance_between_two_steps_of_questions(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = 32
    harness = start(**PATIENT)
    # The machine's own speed must not choose how many.
    takes_long = {False: 0.0, True: math.inf}
    monkeypatch.setattr(StepClock, "alone_seconds", lambda _, count: takes_long[count > at_once])
    monkeypatch.setattr(StepClock, "tokens_beside", lambda *_: at_once)
    names = [f"asked {number}" for number in range(6)]
    for name in names:
        long_ask(name).wait(harness, name, start=True)
    streams, recorder = streams_and_recorder(harness)
    question = Ask("Why so, and what of the circle on the left?", max_tokens=1)
    # All at once, between two steps.
    asked = harness.inspect(lambda _: [question.submit(harness, name) for name in names])
    answers = [pending.wait() for pending in asked]
    computed = sum(final.num_input_tokens - final.num_cached_tokens for _, final in answers)
    assert computed > 2 * at_once
    for stream in streams:
        stream.wait()
    of_questions = [step for step in recorder.steps if max(step) > 1]
    assert len(of_questions) > 1
    assert max(sum(step) - step.count(1) for step in of_questions) <= at_once
    if not has_questions_alone(harness):
        assert min(step.count(1) for step in of_questions) >= len(streams)
        return
    kinds = ["questions" if min(step) > 1 else "answers" for step in recorder.steps]
    assert kinds.count("questions") > 1
    assert ("questions", "questions") not in itertools.pairwise(kinds)


def test_a_long_prompt_comes_in_small_pieces_to_its_end(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine's own speed must not choose the pieces.
    monkeypatch.setattr(StepClock, "tokens_alone", lambda *_: 0)
    monkeypatch.setattr(StepClock, "tokens_beside", lambda *_: 16)
    harness = start()
    streams = [STREAM.submit(harness, name, start=True) for name in ("a", "b", "c", "d")]
    for stream in streams:
        next(stream.deltas())
    recorder = Recorder(harness)
    _, final = Ask("many words " * 60, max_tokens=4).wait(harness, "long", start=True)
    pieces = [count for count in recorder.beside_answers if count]
    assert sum(pieces) == final.num_input_tokens
    assert len(pieces) > 5
    assert max(pieces) == 16  # also the last ones, which are short enough for a question
    for stream in streams:
        stream.wait()


def test_a_first_token_is_on_its_way_before_a_cpu_is_given_the_next_step(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()
    happened: list[str] = []  # on the engine's thread, so in its order
    compute = DeviceThreads.compute

    def record(device: DeviceThreads, step: Step, done: Done) -> None:
        happened.append("step")
        compute(device, step, done)

    monkeypatch.setattr(DeviceThreads, "compute", record)
    harness.submit(
        "asked",
        "Why so?",
        start=True,
        ignore_eos=True,
        listen=lambda event: happened.append(f"token {event.num_output_tokens}"),
    ).wait()
    one_ahead = harness.runner.steps_at_once > 1  # as on a GPU, which does not send
    assert happened[:2] == ["step", "step" if one_ahead else "token 1"]
