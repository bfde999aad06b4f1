"""Bans, biases and penalties, against those of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.model.logits_processors import LogitsProcessors, process_logits
from llava_triton.model.step import token_after
from tests.properties import given

VOCABULARY = 24
EOS = frozenset([3])
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
PARAMETERS = st.builds(
    SamplingParameters,
    frequency_penalty=st.sampled_from([0.0, 0.3, -1.5]),
    presence_penalty=st.sampled_from([0.0, 2.0, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100)).map(
        lambda bias: tuple(bias.items())
    ),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.sampled_from([(), (5, 9), (3,)]),
    ignore_eos=st.booleans(),
)


def slow(
    logits: Tensor, parameters: SamplingParameters, prompt: list[int], answer: list[int]
) -> Tensor:
    """[V] -> [V], in vLLM's order, by transformers where it has such a processor."""
    ends = {*parameters.stop_token_ids, *(() if parameters.ignore_eos else EOS)}
    processors = LogitsProcessorList()
    if ends:
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                len(prompt), parameters.min_tokens, sorted(ends), device="cpu"
            )
        )
    if parameters.logit_bias:
        bias = {(token,): float(value) for token, value in parameters.logit_bias}
        processors.append(SequenceBiasLogitsProcessor(bias))
    processors.append(RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    scores: Tensor = processors(torch.tensor([prompt + answer]), logits[None].clone())[0]
    for token, count in Counter(answer).items():
        scores[token] -= parameters.frequency_penalty * count + parameters.presence_penalty
    return scores


@given(
    seed=st.integers(0, 1000),
    turns=st.lists(
        st.tuples(PARAMETERS, TOKENS.filter(len), TOKENS, st.booleans()), min_size=1, max_size=4
    ),
)
def test_logits_are_those_of_the_slow_reference(
    seed: int, turns: Sequence[tuple[SamplingParameters, list[int], list[int], bool]]
) -> None:
    """Row by row, whatever is beside it, and also where the last token is known to the device
    alone."""
    logits = torch.randn(len(turns) + 1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    latest = torch.zeros(len(turns), dtype=torch.int64)
    changes = []
    for row, (parameters, prompt, answer, ahead) in enumerate(turns):
        unknown = []
        if ahead and answer:
            latest[row] = answer[-1]
            unknown, answer = [token_after(row)], answer[:-1]
        processors = LogitsProcessors(parameters, EOS)
        changes.append(processors.at([*prompt, *answer], len(prompt), unknown))
    expected = torch.stack(
        [slow(row, *turn[:3]) for row, turn in zip(logits, turns, strict=False)] + [logits[-1]]
    )
    process_logits(
        logits,
        [*changes, None],
        lambda ids: torch.where(ids < 0, latest[(-1 - ids).clamp(min=0)], ids),
    )
    torch.testing.assert_close(logits, expected)


def test_who_asks_for_nothing_costs_nothing() -> None:
    assert LogitsProcessors(SamplingParameters(), EOS).at([1, 2], 1, []) is None
    few = LogitsProcessors(SamplingParameters(min_tokens=2), EOS)
    assert few.at([1, 2], 1, []) is not None
    assert few.at([1, 2, 3], 1, []) is None
    assert few.at([1, 2], 1, [token_after(0)]) is None
