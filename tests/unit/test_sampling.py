"""Sampling parameters and the choice of tokens, against a slow reference."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.structured_outputs import StructuredOutputs
from llava_triton.model.sampling import (
    NO_TOKEN,
    Draw,
    Draws,
    SamplingParameters,
    kept_tokens,
    next_tokens,
)
from tests.properties import given, settings


def test_nothing_given_is_greedy() -> None:
    assert SamplingParameters.from_json("{}") == SamplingParameters()
    assert SamplingParameters().temperature == 0.0


def test_everything_given() -> None:
    text = (
        '{"max_tokens": 7, "temperature": 1, "top_p": 0.5, "top_k": -1, "seed": 0, '
        '"stop": ["a", "b"], "ignore_eos": true, "frequency_penalty": -2, "presence_penalty": 2, '
        '"repetition_penalty": 1.5, "min_p": 0.25, "logit_bias": {"7": -1000, "0": 0.5}, '
        '"min_tokens": 7, "stop_token_ids": [3, 0]}'
    )
    assert SamplingParameters.from_json(text) == SamplingParameters(
        max_tokens=7,
        temperature=1.0,
        top_p=0.5,
        top_k=0,
        seed=0,
        stop=("a", "b"),
        ignore_eos=True,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        repetition_penalty=1.5,
        min_p=0.25,
        logit_bias=((7, -100.0), (0, 0.5)),
        min_tokens=7,
        stop_token_ids=(3, 0),
    )


def test_null_is_as_good_as_left_out_and_one_stop_string_may_stand_alone() -> None:
    given = SamplingParameters.from_json('{"stop": "###", "seed": null, "max_tokens": null}')
    assert given == SamplingParameters(stop=("###",))


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("max_tokens", 1, 1),
        ("max_tokens", 10**30, 2**31 - 1),
        ("temperature", 0, 0.0),
        ("temperature", -0.0, 0.0),
        ("temperature", 5e-324, 5e-324),
        ("temperature", 2.0, 2.0),
        ("top_p", 1, 1.0),
        ("top_p", 5e-324, 5e-324),
        ("top_k", -1, 0),
        ("top_k", 0, 0),
        ("top_k", 1, 1),
        ("top_k", 10**30, 2**31 - 1),
        ("seed", 0, 0),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("stop", [], ()),
        ("stop", " ", (" ",)),
        ("stop", ["東" * 128] * 16, ("東" * 128,) * 16),
        ("ignore_eos", False, False),
        ("frequency_penalty", 2, 2.0),
        ("repetition_penalty", 0.01, 0.01),
        ("min_p", 1, 1.0),
        ("logit_bias", {}, ()),
        ("logit_bias", {str(token): 100 for token in range(1024)}, None),
        ("min_tokens", 10**30, 2**31 - 1),
        ("stop_token_ids", list(range(128)), tuple(range(128))),
        ("logprobs", 0, 0),
        ("logprobs", 20, 20),
        ("structured_outputs", {"regex": "a"}, StructuredOutputs(regex="a")),
        ("structured_outputs", {"choice": ["a", "b"]}, StructuredOutputs(choice=("a", "b"))),
        ("structured_outputs", {"json": {"a": 1}}, StructuredOutputs(json='{"a": 1}')),
        ("structured_outputs", {"json": '{"a":1}'}, StructuredOutputs(json='{"a": 1}')),
        (
            "structured_outputs",
            {"json_object": True, "json": None},
            StructuredOutputs(json='{"type": "object"}'),
        ),
    ],
)
def test_values_at_the_limits_are_taken(name: str, value: Any, kept: Any) -> None:
    if kept is None:
        kept = tuple((token, 100.0) for token in range(1024))
    parameters = SamplingParameters.from_json(json.dumps({name: value}))
    assert parameters == SamplingParameters(**{name: kept})
    assert type(getattr(parameters, name)) is type(kept)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("{'max_tokens': 3}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "give a JSON object"),
        ("null", "give a JSON object"),
        ('{"max_token": 3}', 'unknown name "max_token"; known are max_tokens, temperature'),
        ('{"max_tokens": 0}', "max_tokens is 0; it must be a whole number of at least 1"),
        ('{"max_tokens": -5}', "max_tokens is -5"),
        ('{"max_tokens": 3.0}', "max_tokens is 3.0"),
        ('{"max_tokens": true}', "max_tokens is true"),
        ('{"max_tokens": "3"}', 'max_tokens is "3"'),
        ('{"temperature": -0.1}', "temperature is -0.1; it must be a number from 0 to 2"),
        ('{"temperature": 2.5}', "temperature is 2.5"),
        ('{"temperature": false}', "temperature is false"),
        ('{"temperature": NaN}', "NaN is no JSON number"),
        ('{"temperature": 1e999}', "temperature is Infinity"),
        ('{"top_p": 0}', "top_p is 0; it must be a number above 0 and at most 1"),
        ('{"top_p": 1.01}', "top_p is 1.01"),
        ('{"top_k": -2}', "top_k is -2"),
        ('{"top_k": 1.5}', "top_k is 1.5"),
        ('{"seed": -1}', "seed is -1"),
        ('{"seed": 9223372036854775808}', "seed is 9223372036854775808"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"stop": ""}', 'stop is ""; it must be a string or a list of at most 16'),
        ('{"stop": ["a", 1]}', "stop is"),
        ('{"stop": {"a": 1}}', "stop is"),
        (json.dumps({"stop": ["x"] * 17}), "stop is"),
        (json.dumps({"stop": "x" * 129}), "stop is"),
        ('{"ignore_eos": 1}', "ignore_eos is 1; it must be true or false"),
        ('{"frequency_penalty": 2.1}', "frequency_penalty is 2.1; it must be a number from -2 to"),
        ('{"presence_penalty": true}', "presence_penalty is true"),
        ('{"repetition_penalty": 0}', "repetition_penalty is 0; it must be a number from 0.01 to"),
        ('{"repetition_penalty": 1e300}', "repetition_penalty is 1e+300"),
        ('{"min_p": -0.1}', "min_p is -0.1; it must be a number from 0 to 1"),
        ('{"logit_bias": [1]}', "logit_bias is [1]; it must be an object of at most 1024 token"),
        ('{"logit_bias": {"a": 1}}', 'logit_bias is {"a": 1}'),
        ('{"logit_bias": {"-1": 1}}', 'logit_bias is {"-1": 1}'),
        ('{"logit_bias": {"\u00b2": 1}}', "logit_bias is"),
        ('{"logit_bias": {"' + "9" * 5000 + '": 1}}', "logit_bias is"),
        ('{"logit_bias": {"1": "a"}}', 'logit_bias is {"1": "a"}'),
        (json.dumps({"logit_bias": {str(n): 1 for n in range(1025)}}), "logit_bias is"),
        ('{"min_tokens": -1}', "min_tokens is -1; it must be a whole number of at least 0"),
        ('{"min_tokens": 3, "max_tokens": 2}', "min_tokens is 3; it must be at most max_tokens"),
        ('{"stop_token_ids": 3}', "stop_token_ids is 3; it must be a list of at most 128 token"),
        ('{"stop_token_ids": [-1]}', "stop_token_ids is [-1]"),
        (json.dumps({"stop_token_ids": [1] * 129}), "stop_token_ids is"),
        ('{"logprobs": true}', "logprobs is true; it must be a whole number from 0 to 20"),
        ('{"logprobs": 21}', "logprobs is 21"),
        ('{"structured_outputs": "json"}', 'structured_outputs is "json"; it must be an object'),
        ('{"structured_outputs": {}}', "structured_outputs is {}"),
        ('{"structured_outputs": {"json": {}, "regex": "a"}}', "structured_outputs is"),
        ('{"structured_outputs": {"grammar": "a"}}', "structured_outputs is"),
        ('{"structured_outputs": {"json": [1]}}', "structured_outputs is"),
        ('{"structured_outputs": {"json": "{"}}', "structured_outputs is"),
        ('{"structured_outputs": {"regex": ""}}', "structured_outputs is"),
        (r'{"structured_outputs": {"regex": "\ud800"}}', "structured_outputs is"),
        ('{"structured_outputs": {"choice": []}}', "structured_outputs is"),
        ('{"structured_outputs": {"choice": ["a", ""]}}', "structured_outputs is"),
        ('{"structured_outputs": {"json_object": false}}', "structured_outputs is"),
        (json.dumps({"structured_outputs": {"regex": "a" * 4097}}), "structured_outputs is"),
        (json.dumps({"structured_outputs": {"json": {"a": "a" * 32768}}}), "structured_outputs"),
        (json.dumps({"structured_outputs": {"choice": ["a"] * 1001}}), "structured_outputs is"),
        ('{"structured_outputs": {"choice": ["a"]}, "min_tokens": 1}', "neither min_tokens nor"),
        ('{"structured_outputs": {"choice": ["a"]}, "ignore_eos": true}', "neither min_tokens"),
        ('"\\ud800"', 'is "\\ud800"; give a JSON object'),
        ('{"\\ud800": 1}', 'unknown name "\\ud800"'),
        ('{"max_tokens": "\\udfff"}', 'max_tokens is "\\udfff"'),
    ],
)
def test_bad_parameters_are_named(text: str, said: str) -> None:
    with pytest.raises(SessionError) as caught:
        SamplingParameters.from_json(text)
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert said in caught.value.sentence
    assert len(caught.value.sentence) < 400
    assert str(caught.value).encode()  # Triton sends UTF-8; what has none would never be sent


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)
NAMES = [*(field.name for field in fields(SamplingParameters)), "other"]


@given(st.dictionaries(st.sampled_from(NAMES), JSON_VALUES))
def test_any_json_is_taken_or_refused_in_a_sentence(values: dict[str, Any]) -> None:
    try:
        parameters = SamplingParameters.from_json(json.dumps(values))
    except SessionError:
        with pytest.raises(SessionError, match=r"^INVALID_ARG: sampling"):
            SamplingParameters.from_json(json.dumps(values))
        return
    assert 0 <= parameters.temperature <= 2
    assert 0 < parameters.top_p <= 1
    assert parameters.max_tokens is None or parameters.max_tokens >= 1


def slow_probabilities(logits: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    """Temperature, min-p, top-k, top-p over [V] in numpy, token by token."""
    scaled = (logits - logits.max()) / parameters.temperature
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    least = parameters.min_p * probabilities.max()
    order = [token for token in order if probabilities[token] >= least]
    if parameters.top_k:
        order = order[: parameters.top_k]
    total = sum(probabilities[token] for token in order)
    result, together = np.zeros(len(logits)), 0.0
    for token in order:
        if together / total >= parameters.top_p:
            break
        result[token] = probabilities[token]
        together += probabilities[token]
    return np.asarray(result / result.sum())


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    temperature=st.floats(0.05, 2.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 35),
    min_p=st.sampled_from([0.0, 0.013, 0.37, 0.91]),
)
def test_kept_tokens_are_those_of_the_slow_reference(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    parameters = SamplingParameters(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    expected = slow_probabilities(np.array(logits), parameters)
    # Beside another row that has nothing to do with it.
    draws = [Draw(temperature, top_k, top_p, 0.0, min_p), Draw(1.0, 1, 1.0, 0.0)]
    kept, ids = kept_tokens(torch.tensor([logits, logits[::-1]]), draws)
    assert kept.dtype == torch.float64
    actual = np.zeros(len(logits))
    actual[ids[0].numpy()] = (kept[0] / kept[0].sum()).numpy()
    # A sum that equals top_p up to rounding may fall on either side of it.
    if (actual > 0).sum() == (expected > 0).sum():
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    else:
        probabilities = np.sort(expected)[::-1].cumsum()
        assert np.abs(probabilities - top_p).min() < 1e-6 or expected.min() < 1e-12


def chosen(logits: torch.Tensor, draws: Sequence[Draw | None]) -> list[int]:
    """The tokens as numbers."""
    tokens: list[int] = next_tokens(logits, draws).tolist()
    return tokens


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0, seed=1),
        SamplingParameters(temperature=0.5, seed=2),
        SamplingParameters(temperature=1.5, top_k=3, seed=3),
        SamplingParameters(temperature=1.0, top_p=0.8, seed=4),
        SamplingParameters(temperature=2.0, top_k=5, top_p=0.7, seed=5),
    ],
)
def test_draws_follow_the_probabilities(parameters: SamplingParameters) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, -float("inf"), 1.4])
    turn, draws = Draws(parameters), 20_000
    counts = Counter(chosen(logits.expand(draws, -1), [turn.at(n) for n in range(draws)]))
    expected = slow_probabilities(logits.double().numpy(), parameters) * draws
    observed = np.array([counts[token] for token in range(len(logits))])
    assert (observed[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 27.9  # p = 1e-4 with 6 degrees of freedom; the seeds are fixed anyway


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_likeliest_token_or_hardly_any_probability_is_as_good_as_greedy(
    dtype: torch.dtype,
) -> None:
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(1)).to(dtype)
    greedy = chosen(logits, [None] * 20)
    for parameters in (
        SamplingParameters(temperature=2.0, top_k=1),
        SamplingParameters(temperature=2.0, top_p=1e-9),
        SamplingParameters(temperature=1e-9),
        SamplingParameters(temperature=5e-324),
    ):
        # Of several likeliest tokens, any may be drawn.
        drawn = chosen(logits, [Draws(parameters).at(0)] * 20)
        assert [float(row[token]) for row, token in zip(logits, drawn, strict=True)] == [
            float(row[token]) for row, token in zip(logits, greedy, strict=True)
        ]


def test_greedy_takes_the_likeliest_token() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert Draws(SamplingParameters()).at(5) is None
    drawn = Draws(SamplingParameters(temperature=2.0, seed=0)).at(0)
    first, _, third = chosen(logits, [None, drawn, None])
    assert [first, third] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_a_seed_gives_the_same_answer_whatever_else_is_drawn() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    parameters = SamplingParameters(temperature=1.0, seed=2**63 - 1)
    alone = Draws(parameters)
    first = chosen(logits, [alone.at(number) for number in range(50)])
    again, other = Draws(parameters), Draws(SamplingParameters(temperature=2.0))
    second = []
    for number, row in enumerate(logits):
        torch.rand(3)
        # Computed twice, as after a step that failed.
        for _ in range(2):
            _, token = chosen(torch.stack([-row, row]), [other.at(number), again.at(number)])
        second.append(token)
    assert first == second


def test_without_a_seed_answers_differ() -> None:
    logits = torch.zeros(1000)
    turns = [Draws(SamplingParameters(temperature=1.0)) for _ in range(2)]
    answers = [chosen(logits.expand(8, -1), [turn.at(n) for n in range(8)]) for turn in turns]
    assert answers[0] != answers[1]


@settings(max_examples=50)
@given(temperature=st.floats(0.0, 2.0), seed=st.integers(0, 2**63 - 1))
def test_extreme_temperatures_and_logits_give_a_possible_token(
    temperature: float, seed: int
) -> None:
    parameters = SamplingParameters(temperature=temperature, seed=seed)
    logits = torch.tensor([[-float("inf"), 3e38, -3e38, 0.0]])
    assert chosen(logits, [Draws(parameters).at(0)]) == [1]


def test_logits_that_are_no_numbers_give_no_token() -> None:
    """Nor an index outside of the vocabulary, which on a GPU would end every session of the
    process: the model runner looks up no token that is none."""
    logits = torch.zeros(3, 5)
    logits[0, 2], logits[1, 3] = torch.nan, torch.inf
    draw = Draw(temperature=1.0, top_k=0, top_p=1.0, number=0.5)
    tokens = next_tokens(logits, [draw] * 3)
    assert tokens.tolist()[:2] == [NO_TOKEN, NO_TOKEN]
    assert 0 <= tokens[2] < 5
