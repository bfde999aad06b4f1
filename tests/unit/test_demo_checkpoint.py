"""The trained demo checkpoint, through nothing but transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from demo.evaluate import CHECKPOINT, answers, evaluate, load, share

ROOT = Path(__file__).resolve().parents[2]


def test_every_tensor_is_where_transformers_looks_for_it() -> None:
    _, info = LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert {kind: list(info[kind]) for kind in kinds} == {kind: [] for kind in kinds}


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 5_000_000


def test_the_demo_conversation_is_answered_as_written() -> None:
    model, processor = load(CHECKPOINT)
    talk = json.loads((ROOT / "demo" / "conversation.json").read_text())
    history: list[dict[str, Any]] = []
    given = {}
    with Image.open(ROOT / talk["picture"]) as picture:
        for turn in talk["turns"]:
            image = [] if history else [{"type": "image"}]
            content = [*image, {"type": "text", "text": turn["question"]}]
            history.append({"role": "user", "content": content})
            given[turn["question"]] = answers(model, processor, [history], [[picture]])[0]
            said = {"type": "text", "text": given[turn["question"]]}
            history.append({"role": "assistant", "content": [said]})
    assert given == {turn["question"]: turn["answer"] for turn in talk["turns"]}


def test_unseen_pictures_are_answered_correctly() -> None:
    asked = evaluate(CHECKPOINT, 100)
    assert len(asked) >= 100
    assert share(asked) >= 0.95, [one for one in asked if not one.correct]
