"""Log probabilities of answers, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_triton.contract.delta import Delta
from tests.engine_harness import EngineHarness, Pending
from tests.reference import TransformersChat
from tests.small_engine import PICTURES, Start

QUESTION = "What is it?"
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.3, "seed": 5},
    # They change what is chosen, not what the model made of it.
    "biased": {"repetition_penalty": 1.4, "logit_bias": ((45, 3.0),)},
}


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> TransformersChat:
    return TransformersChat(checkpoint)


def expected_logprobs(
    chat: TransformersChat, harness: EngineHarness, name: str, final: Delta
) -> Any:
    """Of every token in the place of each of the answer's, float32 [tokens, V]."""
    ids = torch.tensor([harness.history(name)])
    pixels = chat.image_processor(PICTURES[:1], return_tensors="pt")
    with torch.inference_mode():
        output = chat.model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels)
    logits = output.logits[0, final.num_input_tokens - 1 : -1].clone()
    logits[:, chat.model.config.image_token_id] = -torch.inf
    return logits.log_softmax(-1)


def pieces_of(pending: Pending) -> list[Delta]:
    return list(pending.deltas())


def test_they_are_those_of_transformers_whatever_is_beside_them(
    start: Start, chat: TransformersChat
) -> None:
    harness = start()
    with harness.held_device():
        plain = harness.submit("plain", QUESTION, PICTURES[:1], start=True)
        asked = {
            name: harness.submit(name, QUESTION, PICTURES[:1], start=True, logprobs=4, **more)
            for name, more in ASKED.items()
        }
    assert not any(piece.logprobs for piece in pieces_of(plain))
    for name, pending in asked.items():
        pieces = pieces_of(pending)
        told = [json.loads(token) for piece in pieces for token in piece.logprobs]
        final = pieces[-1]
        assert len(told) == final.num_output_tokens
        answer = harness.history(name)[final.num_input_tokens :]
        for token, row, expected in zip(
            answer, told, expected_logprobs(chat, harness, name, final), strict=True
        ):
            assert row["logprob"] == pytest.approx(float(expected[token]), abs=1e-4)
            values, ids = expected.topk(4)
            likeliest = row["top_logprobs"]
            assert [each["logprob"] for each in likeliest] == pytest.approx(
                values.tolist(), abs=1e-4
            )
            texts = chat.tokenizer.batch_decode(ids[:, None])
            assert [each["token"] for each in likeliest] == texts
        spelled = b"".join(bytes(row["bytes"]) for row in told)
        text = "".join(piece.text for piece in pieces)
        assert spelled.decode(errors="replace").removeprefix(" ") == text


def test_a_stop_string_takes_the_logprobs_of_what_was_never_said(start: Start) -> None:
    harness = start()
    text, _ = harness.ask("whole", QUESTION, start=True, ignore_eos=True)
    pending = harness.submit(
        "cut", QUESTION, start=True, ignore_eos=True, stop=(text[5:9],), logprobs=0
    )
    pieces = pieces_of(pending)
    assert pieces[-1].finish_reason == "stop"
    assert sum(len(piece.logprobs) for piece in pieces) == pieces[-1].num_output_tokens


def test_only_the_chosen_tokens_where_no_others_are_wanted(start: Start) -> None:
    pieces = pieces_of(start().submit("s", QUESTION, start=True, logprobs=0))
    told = [json.loads(token) for piece in pieces for token in piece.logprobs]
    assert told
    assert all(row["top_logprobs"] == [] for row in told)
