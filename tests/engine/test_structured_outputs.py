"""Answers of a given form beside others, whatever happens to them."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from demo.shapes import COLORS, SIZES, draw, random_scene
from demo.shapes import FORMS as KNOWN_FORMS
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.structured_outputs import StructuredOutputs
from llava_triton.conversation.grammar import Grammar, Grammars
from llava_triton.engine.state import EngineState
from llava_triton.model.device_threads import DeviceThreads, Done
from llava_triton.model.runner import ModelRunner
from llava_triton.model.step import LaunchedStep, Step
from tests.checkpoints import DEMO
from tests.engine_harness import EngineHarness
from tests.small_engine import (
    HANG_SECONDS,
    PICTURES,
    Alone,
    Ask,
    Start,
    check_hardships_change_nothing,
    failure,
    long_ask,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "green"]},
        "shape": {"enum": ["circle", "square", "star"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "shape", "count"],
    "additionalProperties": False,
}
FORMS = {
    "json": StructuredOutputs(json=json.dumps(SCHEMA)),
    "regex": StructuredOutputs(regex="[a-f]{3}-[0-9]{4}"),
    "choice": StructuredOutputs(choice=("yes, it is", "no, it is not")),
}
PLAIN = Ask("Go on", (PICTURES[0],), max_tokens=60, ignore_eos=True)


def check(name: str, text: str) -> None:
    if name == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch("[a-f]{3}-[0-9]{4}", text)
    else:
        assert text in FORMS["choice"].choice


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 1}], ids=["greedy", "drawn"])
def test_answers_have_their_forms_and_those_beside_them_are_the_same(
    start: Start, alone: Alone, sampling: dict[str, Any]
) -> None:
    harness = start()
    with harness.held_device():
        plain = [PLAIN.submit(harness, f"plain {number}", start=True) for number in range(2)]
        turns = {
            name: harness.submit(
                name, "What?", start=True, max_tokens=100, structured_outputs=form, **sampling
            )
            for name, form in FORMS.items()
        }
    for name, turn in turns.items():
        text, final = turn.wait()
        assert final.finish_reason == "stop"
        check(name, text)
    assert [each.wait()[0] for each in plain] == alone(PLAIN) * 2
    text, _ = harness.ask("json", "Again?", max_tokens=100, structured_outputs=FORMS["json"])
    check("json", text)


def test_an_answer_that_is_cut_says_so(start: Start) -> None:
    text, final = start().ask(
        "s", "What?", start=True, max_tokens=3, structured_outputs=FORMS["json"]
    )
    assert (final.finish_reason, final.num_output_tokens) == ("length", 3)
    assert text.startswith("{")
    assert not text.endswith("}")


def test_others_are_launched_ahead_as_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a form is followed, which takes every second step."""
    harness = EngineHarness(checkpoint, steps_at_once=2)
    launch, compute = ModelRunner.launch, DeviceThreads.compute
    steps: list[dict[bool, int]] = []
    """Of each step how many parts' tokens were not known yet (True), and were."""
    given: list[Step] = []

    def planned(state: EngineState) -> bool:
        """Whether the engine has planned behind this step, if it can before this one is done."""
        running, in_flight = state.running, state.steps_in_flight
        left = [each.max_tokens - each.answer_tokens for each in running if each.grammar is None]
        can_plan = all(each.answer_tokens for each in running) and max(left, default=0) > 2
        landed = len(given) - in_flight
        return landed == len(steps) - 1 and (in_flight == 2 or not can_plan)

    def watched(runner: ModelRunner, step: Step) -> LaunchedStep:
        steps.append(Counter(part.ids[0] < 0 for part in step.parts))
        given_up = time.monotonic() + HANG_SECONDS
        while not harness.inspect(planned):
            assert time.monotonic() < given_up, "nothing was planned behind a step"
        return launch(runner, step)

    def counted(device: DeviceThreads, step: Step, done: Done) -> None:
        given.append(step)
        compute(device, step, done)

    monkeypatch.setattr(ModelRunner, "launch", watched)
    monkeypatch.setattr(DeviceThreads, "compute", counted)
    endless = StructuredOutputs(regex="[a-z ]{400}")
    try:
        with harness.held_device():
            plain = PLAIN.submit(harness, "plain", start=True)
            formed = harness.submit(
                "form", "What?", start=True, max_tokens=25, structured_outputs=endless
            )
            while not harness.inspect(lambda state: len(state.running) == 2):
                pass
        _, final_of_plain = plain.wait()
        text, final = formed.wait()
    finally:
        harness.shutdown()
    assert re.fullmatch("[a-z ]+", text)
    assert (final.finish_reason, final.num_output_tokens) == ("length", 25)
    assert final_of_plain.num_output_tokens == PLAIN.max_tokens
    # All but the first of the plain turn's tokens, or nearly all, while the other advanced, too.
    assert sum(step[True] for step in steps) >= PLAIN.max_tokens - 5
    assert sum(step[True] == step[False] == 1 for step in steps) >= 15


def test_a_form_goes_on_as_it_was_after_a_failed_step_and_where_it_is_put_back(
    start: Start, quiet: EngineHarness
) -> None:
    asked: dict[str, dict[str, Any]] = {
        "old": {"max_tokens": 200, "ignore_eos": True},
        **{
            f"form {number}": {
                "max_tokens": 200,
                "temperature": 1.0,
                "seed": number,
                "structured_outputs": StructuredOutputs(regex="[a-z ]{150,}"),
            }
            for number in range(3)
        },
    }
    check_hardships_change_nothing(start, quiet, asked)


def test_a_form_that_cannot_be_followed_is_refused_and_changes_nothing(
    start: Start, alone: Alone
) -> None:
    harness = start()
    opening = long_ask("red")
    opening.wait(harness, "s", start=True)
    with pytest.raises(SessionError, match="structured_outputs cannot be followed: uncl") as caught:
        harness.ask("s", "What?", structured_outputs=StructuredOutputs(regex="(a"))
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert Ask("?").wait(harness, "s")[0] == alone(opening, Ask("?"))[-1]


def test_a_form_that_becomes_too_complex_fails_its_turn_alone(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()
    take = Grammar.take
    taken: list[int] = []

    def failing(grammar: Grammar, token: int) -> None:
        taken.append(token)
        # A control character may not come.
        take(grammar, harness.runner.image_token_id if len(taken) == 5 else token)

    monkeypatch.setattr(Grammar, "take", failing)
    with harness.held_device():
        plain = PLAIN.submit(harness, "plain", start=True)
        formed = harness.submit("s", "?", start=True, structured_outputs=FORMS["json"])
    assert failure(formed) is ErrorCode.INVALID_ARG
    assert plain.wait()[0] == alone(PLAIN)[0]


def test_compiling_holds_up_nobody(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_now, may_go_on = Grammars.compile, threading.Event()

    def slow(grammars: Grammars, form: StructuredOutputs) -> Grammar:
        assert may_go_on.wait(60)
        return compile_now(grammars, form)

    monkeypatch.setattr(Grammars, "compile", slow)
    harness = start()
    formed = harness.submit("s", "?", start=True, structured_outputs=FORMS["choice"])
    assert PLAIN.wait(harness, "plain", start=True)[0] == alone(PLAIN)[0]
    may_go_on.set()
    check("choice", formed.wait()[0])


# Fields of a picture, by a model that knows pictures.


@pytest.fixture
def demo() -> Iterator[EngineHarness]:
    harness = EngineHarness(DEMO)
    yield harness
    harness.shutdown()


def test_fields_of_a_picture(demo: EngineHarness) -> None:
    """The demo model knows no JSON; what it knows are sentences, and here they are fields."""
    seen = (
        f"There is one shape: a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(KNOWN_FORMS)})"
    )
    asked: dict[str, tuple[str, Any]] = {
        "What shape is it?": ("shape", {"enum": [f"It is a {form}." for form in KNOWN_FORMS]}),
        "What color is the shape?": (
            "colour",
            {"enum": [f"The shape is {color}." for color in COLORS]},
        ),
        "Describe the picture.": ("picture", {"type": "string", "pattern": f"^{seen}$"}),
    }
    for number in range(4):
        (shape,) = (scene := random_scene(random.Random(f"fields {number}"), 1)).shapes
        right = {
            "shape": f"It is a {shape.form}.",
            "colour": f"The shape is {shape.color}.",
            "picture": f"There is one shape: a {shape.size} {shape.color} {shape.form}",
        }
        for question, (name, field) in asked.items():
            schema = {
                "type": "object",
                "properties": {name: field},
                "required": [name],
                "additionalProperties": False,
            }
            text, final = demo.ask(
                "s",
                question,
                [draw(scene, 96)],
                start=True,
                max_tokens=60,
                structured_outputs=StructuredOutputs(json=json.dumps(schema)),
            )
            assert final.finish_reason == "stop"
            assert json.loads(text) == {name: right[name]}
