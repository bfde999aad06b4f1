"""Log probabilities on the device, and the texts of single tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from llava_triton.conversation.token_texts import TokenTexts
from llava_triton.model.logprobs import AskedLogprobs
from tests import tokenizers_for_tests

TEXT = "Is there a red circle? naïve – 東京 😀\n"


def test_rows_are_told_what_they_ask_for() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    logits[0, 2] = -torch.inf
    expected = logits.log_softmax(-1)
    asked = AskedLogprobs(logits, [3, None, 0, 20])
    logits.zero_()  # as whoever changes them before a token is chosen
    first, none, chosen_alone, all_of_them = asked.of(torch.tensor([4, 5, 6, -1]))()
    assert none is None
    assert first is not None
    assert chosen_alone is not None
    assert all_of_them is not None
    assert first.logprob == pytest.approx(float(expected[0, 4]))
    values, ids = expected[0].topk(3)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(values.tolist())
    assert chosen_alone.logprob == pytest.approx(float(expected[2, 6]))
    assert chosen_alone.top == ()
    assert sorted(token for token, _ in all_of_them.top) == list(range(9))


def test_where_nobody_asks_nothing_is_computed() -> None:
    logits = mock.Mock(shape=(2, 3))  # of no use to compute with
    asked = AskedLogprobs(logits, [None, None])
    assert logits.mock_calls == []
    assert asked.of(torch.tensor([0, 1]))() == [None, None]


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizers_for_tests.byte_level,
        tokenizers_for_tests.sentence_piece,
        tokenizers_for_tests.of_demo_checkpoint,
    ],
)
def test_the_bytes_of_all_tokens_are_the_text(tokenizer: Callable[[], Any]) -> None:
    made = tokenizer()
    texts = TokenTexts(made)
    ids = made(TEXT, add_special_tokens=False)["input_ids"]
    spelled = b"".join(map(texts.bytes_of, ids))
    assert spelled.decode().removeprefix(" ") == TEXT
    eos = made.eos_token_id
    assert texts.bytes_of(eos) == b"</s>"
    assert texts.bytes_of(10**6) == b""


def test_a_token_is_told_as_openai_does() -> None:
    made = tokenizers_for_tests.byte_level()
    first, second, *_ = made("漢", add_special_tokens=False)["input_ids"]
    told = json.loads(TokenTexts(made).told(first, -0.5, [(second, -float("inf"))]))
    (likeliest,) = told.pop("top_logprobs")
    assert told == {"token": "\ufffd", "logprob": -0.5, "bytes": [0xE6]}
    assert (likeliest["logprob"], likeliest["bytes"]) == (-9999.0, [0xBC])
