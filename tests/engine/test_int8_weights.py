"""Weights rounded to 8-bit integers: how far, and that the engine computes with what is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_triton.contract.settings import Settings
from llava_triton.kernels.int8 import Int8Weight
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Ask

LAYERS = ("self_attn.", "mlp.")
ASKS = [
    Ask("What colour is it?", (PICTURES[2],), 24, ignore_eos=True),
    Ask("And how large?", (), 24, ignore_eos=True),
    Ask("Tell me more about it.", (PICTURES[5],), 24, ignore_eos=True),
]


def test_no_weight_moves_by_more_than_half_a_step_of_its_row() -> None:
    weight = torch.randn(40, 96) * torch.logspace(-4, 4, 40)[:, None]
    rounded = Int8Weight.of(weight)
    steps = weight.abs().amax(dim=1) / 127
    assert torch.all((rounded.dequantized(torch.float32) - weight).abs() <= steps[:, None] * 0.5001)
    assert int(rounded.integers.abs().max()) == 127


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.randn(3, 8)
    weight[1] = 0.0
    again = Int8Weight.of(weight).dequantized(torch.float32)
    assert torch.equal(again[1], torch.zeros(8))
    assert torch.isfinite(again).all()


@pytest.fixture(scope="module")
def rounded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the weights that rounding leaves, as floats."""
    directory = tmp_path_factory.mktemp("rounded") / "checkpoint"
    shutil.copytree(checkpoint, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, weight in tensors.items():
        in_layer = name.startswith("language_model") and any(part in name for part in LAYERS)
        if in_layer and weight.dim() == 2:
            tensors[name] = Int8Weight.of(weight).dequantized(torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture
def engines(checkpoint: Path, rounded: Path) -> Iterator[dict[str, EngineHarness]]:
    """By what their weights are."""
    made = {
        "int8": EngineHarness(checkpoint, weights="int8"),
        "rounded": EngineHarness(rounded),
        "unrounded": EngineHarness(checkpoint),
    }
    yield made
    for engine in made.values():
        engine.shutdown()


def test_the_engine_answers_as_the_rounded_model_does(engines: dict[str, EngineHarness]) -> None:
    told = {
        name: [
            engine_answers(engine, number, side_by_side)
            for number in range(3)
            for side_by_side in (1, 5)
        ]
        for name, engine in engines.items()
    }
    assert told["int8"] == told["rounded"]
    assert told["int8"] != told["unrounded"]  # else the setting does nothing


def engine_answers(engine: EngineHarness, number: int, side_by_side: int) -> list[list[str]]:
    """Of so many sessions at once that all ask the same: few rows a step, or many."""
    names = [f"{side_by_side} {number} {session}" for session in range(side_by_side)]
    answers = []
    for turn in range(len(ASKS)):
        ask = ASKS[(turn + number) % len(ASKS)]
        pending = [
            ask.submit(engine, name, start=turn == 0, end=turn == len(ASKS) - 1) for name in names
        ]
        answers.append([each.wait()[0] for each in pending])
    return answers


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights is 'int4'; it must be one of"):
        Settings(weights="int4")
