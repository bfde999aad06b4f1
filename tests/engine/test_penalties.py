"""Penalties, biases and ends of answers: against transformers, and whatever happens to a turn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from llava_triton.contract.errors import ErrorCode, SessionError
from tests.engine_harness import EngineHarness
from tests.reference import TransformersChat
from tests.small_engine import PICTURES, Start, check_hardships_change_nothing, failure

TURNS = (("What is it?", (PICTURES[0],)), ("Go on, go on.", ()))
ASKED: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.5},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": tuple((token, 2.5) for token in range(40, 60))},
    "all": {
        "frequency_penalty": 0.4,
        "presence_penalty": 0.6,
        "repetition_penalty": 1.1,
        "logit_bias": ((45, 3.0), (46, -100.0)),
    },
}


class CountPenalties:
    """Frequency and presence of a token in what follows the prompt; transformers has none."""

    def __init__(self, prompt_tokens: int, frequency: float, presence: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for token, count in Counter(input_ids[0, self._prompt_tokens :].tolist()).items():
            scores[0, token] -= self._frequency * count + self._presence
        return scores


class SlowChat(TransformersChat):
    """Takes the engine's sampling parameters."""

    def _generate(self, max_tokens: int, **asked: Any) -> list[int]:
        processors = LogitsProcessorList()
        if bias := asked.get("logit_bias"):
            processors.append(SequenceBiasLogitsProcessor({(each,): by for each, by in bias}))
        processors += [
            RepetitionPenaltyLogitsProcessor(asked.get("repetition_penalty", 1.0)),
            CountPenalties(
                len(self.ids),
                asked.get("frequency_penalty", 0.0),
                asked.get("presence_penalty", 0.0),
            ),
        ]
        return super()._generate(max_tokens, logits_processor=processors)


@pytest.fixture(scope="module")
def slow_answers(checkpoint: Path) -> dict[str, list[str]]:
    chat, answers = SlowChat(checkpoint), {}
    for name, asked in {"plain": {}, **ASKED}.items():
        chat.restart()
        answers[name] = [
            chat.decode(chat.ask(text, images, max_tokens=40, **asked)) for text, images in TURNS
        ]
    return answers


def test_they_change_answers(slow_answers: dict[str, list[str]]) -> None:
    """Else the tests below could not fail."""
    assert len({answers[0] for answers in slow_answers.values()}) == len(slow_answers)


def test_answers_side_by_side_are_those_of_transformers(
    start: Start, slow_answers: dict[str, list[str]]
) -> None:
    harness = start()
    found: dict[str, list[str]] = {name: [] for name in slow_answers}
    for index, (text, images) in enumerate(TURNS):
        with harness.held_device():  # until all of them are there
            asked = {
                name: harness.submit(
                    name, text, images, start=index == 0, max_tokens=40, **ASKED.get(name, {})
                )
                for name in slow_answers
            }
        for name, pending in asked.items():
            found[name].append(pending.wait()[0])
    assert found == slow_answers


def test_a_turn_goes_on_as_it_was_after_a_failed_step_and_where_it_is_put_back(
    start: Start, quiet: EngineHarness
) -> None:
    asked = {
        name: {"max_tokens": 150, "ignore_eos": True, **more}
        for name, more in {"plain": {}, **ASKED}.items()
    }
    check_hardships_change_nothing(start, quiet, asked)


def test_an_undone_turn_leaves_no_penalty_behind(start: Start, quiet: EngineHarness) -> None:
    penalty = {"repetition_penalty": 1.4, "max_tokens": 20, "ignore_eos": True}
    quiet.restart()
    expected = [quiet.ask("s", text, start=text == "A", **penalty)[0] for text in ("A", "B")]
    harness = start()
    first = harness.ask("s", "A", start=True, **penalty)[0]
    undone = harness.submit("s", "C", max_tokens=2000, ignore_eos=True, repetition_penalty=1.4)
    next(undone.deltas())
    harness.engine.cancel(undone.id)
    assert failure(undone) is ErrorCode.CANCELLED
    assert [first, harness.ask("s", "B", **penalty)[0]] == expected


# How answers end.


@pytest.fixture
def harness(start: Start) -> EngineHarness:
    return start()


def answer_ids(harness: EngineHarness, name: str, **sampling: Any) -> tuple[list[int], str]:
    _, final = harness.ask(name, "What is it?", start=True, **sampling)
    return harness.history(name)[final.num_input_tokens :], final.finish_reason


def test_a_stop_token_ends_an_answer_and_is_the_last_of_it(harness: EngineHarness) -> None:
    whole, _ = answer_ids(harness, "whole", ignore_eos=True)
    stop = next(token for token in whole[3:] if token not in whole[:3])
    end = whole.index(stop) + 1
    assert answer_ids(harness, "cut", ignore_eos=True, stop_token_ids=(stop,)) == (
        whole[:end],
        "stop",
    )


def test_a_special_stop_token_is_no_part_of_the_answer(harness: EngineHarness) -> None:
    special = min(harness.runner.eos_token_ids)
    forced = {"logit_bias": ((special, 100.0),), "ignore_eos": True}
    assert answer_ids(harness, "special", stop_token_ids=(special,), **forced) == ([], "stop")


def test_an_answer_has_the_least_tokens_asked_for(harness: EngineHarness) -> None:
    eos = min(harness.runner.eos_token_ids)
    ends_at_once = {"logit_bias": ((eos, 100.0),)}
    assert answer_ids(harness, "short", **ends_at_once) == ([], "stop")
    ids, reason = answer_ids(harness, "long", min_tokens=5, **ends_at_once)
    assert (len(ids), reason, eos in ids) == (5, "stop", False)


def test_no_stop_string_counts_before_the_least_tokens(harness: EngineHarness) -> None:
    whole, _ = harness.ask("whole", "What is it?", start=True, ignore_eos=True, max_tokens=30)
    stop = whole[:3]
    text, final = harness.ask(
        "cut", "What is it?", start=True, ignore_eos=True, max_tokens=30, stop=(stop,)
    )
    assert (text, final.finish_reason) == ("", "stop")
    text, final = harness.ask(
        "late",
        "What is it?",
        start=True,
        ignore_eos=True,
        max_tokens=30,
        min_tokens=12,
        stop=(stop,),
    )
    assert final.num_output_tokens > 12
    assert text.startswith(stop)


@pytest.mark.parametrize(
    "asked",
    [{"stop_token_ids": (10**6,)}, {"logit_bias": ((10**6, 1.0),)}],
    ids=lambda it: next(iter(it)),
)
def test_a_token_that_the_model_does_not_have_is_refused(
    harness: EngineHarness, asked: dict[str, Any]
) -> None:
    with pytest.raises(
        SessionError, match="has the token ID 1000000; this model's are 0 to "
    ) as caught:
        harness.ask("s", "What is it?", start=True, **asked)
    assert caught.value.code is ErrorCode.INVALID_ARG
