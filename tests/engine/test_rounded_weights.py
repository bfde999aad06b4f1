"""Weights rounded to integers: how far, and that the engine computes with what is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_triton.contract.settings import Settings
from llava_triton.kernels.int4 import Int4Weight, in_groups
from llava_triton.kernels.int8 import Int8Weight
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Ask

ROUNDED: dict[str, type[Int8Weight] | type[Int4Weight]] = {
    "int8": Int8Weight,
    "int4": Int4Weight,
}
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


@pytest.mark.parametrize("inputs", [128, 200, 384])
def test_no_weight_in_4_bits_moves_by_more_than_a_step_but_those_cut_off(inputs: int) -> None:
    torch.manual_seed(inputs)
    weight = torch.randn(40, inputs) * torch.logspace(-4, 4, 40)[:, None]
    rounded = Int4Weight.of(weight)
    moved = (rounded.dequantized(torch.float32) - weight).abs()
    steps = rounded.scales.repeat_interleave(128, dim=1)[:, :inputs]
    inside = (rounded.integers > 0) & (rounded.integers < 15)
    assert torch.all(moved[inside] <= steps[inside] * 0.5001)
    # What is cut off is at most 0.3 of a range of 15 steps.
    assert torch.all(moved <= steps * (0.3 * 15 / 0.7 + 1.0))


def test_each_group_in_4_bits_has_the_range_that_loses_least() -> None:
    torch.manual_seed(1)
    weight = torch.randn(6, 200)
    rounded = Int4Weight.of(weight)
    for row, values in enumerate(in_groups(weight, 128)):
        for group, floats in enumerate(values):
            errors = {}
            for shrink in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7):
                least = min(0.0, float(floats.min()))
                span = (max(0.0, float(floats.max())) - least) / 15
                zero, scale = round(-least / span), span * shrink
                integers = (floats / scale + zero).round().clamp(0, 15)
                errors[scale] = float((((integers - zero) * scale) - floats).square().sum())
            best = min(errors, key=lambda scale: errors[scale])
            assert float(rounded.scales[row, group]) == pytest.approx(best, rel=1e-5)


def test_groups_of_zeros_and_of_one_sign_stay_so() -> None:
    weight = torch.randn(4, 256)
    weight[0, :128] = 0.0
    weight[1], weight[2] = weight[1].abs() + 5.0, -weight[2].abs()
    again = Int4Weight.of(weight).dequantized(torch.float32)
    assert torch.equal(again[0, :128], torch.zeros(128))
    assert torch.all(again[1] > 0.0)
    assert torch.all(again[2] <= 0.0)


@pytest.fixture(scope="module", params=ROUNDED)
def rounded(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A rounding, and the checkpoint with the weights that it leaves, as floats."""
    kind: str = request.param
    directory = tmp_path_factory.mktemp("rounded") / "checkpoint"
    shutil.copytree(checkpoint, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, weight in tensors.items():
        in_layer = name.startswith("language_model") and any(part in name for part in LAYERS)
        if in_layer and weight.dim() == 2:
            tensors[name] = ROUNDED[kind].of(weight).dequantized(torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return kind, directory


@pytest.fixture
def engines(checkpoint: Path, rounded: tuple[str, Path]) -> Iterator[dict[str, EngineHarness]]:
    """By what their weights are."""
    kind, directory = rounded
    made = {
        "integers": EngineHarness(checkpoint, weights=kind),
        "rounded": EngineHarness(directory),
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
    assert told["integers"] == told["rounded"]
    assert told["integers"] != told["unrounded"]  # else the setting does nothing


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
    with pytest.raises(ValueError, match="weights is 'int3'; it must be one of"):
        Settings(weights="int3")
