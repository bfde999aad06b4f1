"""Checkpoints with 4-bit weights are read as they are: AWQ's and compressed-tensors'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_export.cli import main
from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.checkpoint.packed import GROUP_MULTIPLE, SMALL_GROUPS
from llava_triton.checkpoint.weights import CheckpointError, CheckpointWeights
from llava_triton.kernels.int4 import GROUP, GROUPS, Int4Weight
from llava_triton.model.text_model import TextModel
from tests.checkpoints import tiny_llava
from tests.engine_harness import EngineHarness
from tests.packed_checkpoints import awq_config, compressed_config, pack
from tests.reference import TransformersChat

LAYER = "language_model.model.layers.0.mlp"
WAYS = {
    "awq": awq_config(128),
    "awq, small groups": awq_config(32),
    "compressed-tensors": compressed_config(128, symmetric=True),
    "compressed-tensors, zero points": compressed_config(64, symmetric=False),
    "compressed-tensors, large groups": compressed_config(256, symmetric=True),
    "compressed-tensors, rows": compressed_config(None, symmetric=False),
}
QUESTIONS = ("What is it?", "How many are there, and where?", "Why?")


def checkpoint(folder: Path) -> Path:
    """With inputs of 256 and 512, and biases."""
    options: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "attention_bias": True}
    return tiny_llava(folder / "unpacked", kv_heads=2, seed=3, text_options=options)


@pytest.mark.parametrize("way", WAYS)
def test_conversations_equal_transformers_on_the_same_weights(way: str, tmp_path: Path) -> None:
    packed, floats = pack(checkpoint(tmp_path), tmp_path, WAYS[way])
    reference = TransformersChat(floats)
    harness = EngineHarness(packed, tower=floats)
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    try:
        for index, question in enumerate(QUESTIONS):
            images = [picture] if index == 0 else []
            expected = reference.ask(question, images, max_tokens=16)
            text, final = harness.ask("s", question, images, start=index == 0, max_tokens=16)
            assert text == reference.decode(expected)
            assert final.num_output_tokens == len(expected)
    finally:
        harness.shutdown()


@pytest.mark.parametrize("way", WAYS)
def test_the_matrices_are_those_that_were_packed(way: str, tmp_path: Path) -> None:
    packed, floats = pack(checkpoint(tmp_path), tmp_path, WAYS[way])
    expected = load_file(floats / "model.safetensors")
    weights = CheckpointWeights(packed)
    found = 0
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        if weights.is_packed(module):
            parts = weights.packed(module, torch.device("cpu"))
            read = Int4Weight.of_parts(*parts, dtype=torch.float32)
            assert torch.equal(read.dequantized(torch.float32), weight)
            found += 1
    assert found == 2 * 7


def test_the_groups_that_are_read_are_those_of_the_kernels() -> None:
    assert (*SMALL_GROUPS, GROUP_MULTIPLE) == GROUPS
    assert GROUP_MULTIPLE == GROUP


def test_it_is_exported_as_it_is(tmp_path: Path) -> None:
    packed, _ = pack(checkpoint(tmp_path), tmp_path, WAYS["awq"])
    assert main(["--model", str(packed), "--output", str(tmp_path / "repository")]) == 0


def test_rounding_to_8_bits_what_has_4_is_refused(tmp_path: Path) -> None:
    packed, _ = pack(checkpoint(tmp_path), tmp_path, WAYS["awq"])
    loaded = load_checkpoint(packed)
    TextModel(loaded, weights="int4")
    with pytest.raises(ValueError, match="4-bit integers already; the setting weights is 'int8'"):
        TextModel(loaded, weights="int8")


def test_a_packed_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    packed, _ = pack(checkpoint(tmp_path), tmp_path, WAYS["awq"])
    file = packed / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{LAYER}.up_proj.scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(layers.0.mlp.up_proj.scales\)"):
        load_checkpoint(packed)


@pytest.mark.parametrize("told", [[512, 248], [512, 264], [504, 256], [-1, 0]])
def test_a_matrix_that_tells_another_shape_is_named(told: list[int], tmp_path: Path) -> None:
    packed, _ = pack(checkpoint(tmp_path), tmp_path, WAYS["compressed-tensors"])
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = f"{LAYER}.up_proj.weight_shape"
    assert tensors[name].tolist() == [512, 256]
    tensors[name] = torch.tensor(told)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of the wrong shape \(layers.0.mlp.up_proj.weight_s"):
        load_checkpoint(packed)


def test_a_projection_that_is_not_packed_as_its_neighbours_are_is_named(tmp_path: Path) -> None:
    packed, floats = pack(checkpoint(tmp_path), tmp_path, WAYS["awq"])
    file, name = packed / "model.safetensors", f"{LAYER}.up_proj"
    tensors = load_file(file)
    for end in ("qweight", "qzeros", "scales"):
        del tensors[f"{name}.{end}"]
    tensors[f"{name}.weight"] = load_file(floats / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gate_proj have 4-bit weights, and what is multiplied"):
        TextModel(load_checkpoint(packed))


def changed(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return config | fields


def with_scheme(**fields: Any) -> dict[str, Any]:
    config = compressed_config(128, symmetric=True)
    scheme = config["config_groups"]["group_0"]
    scheme["weights"] |= fields
    return config


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        (changed(awq_config(128), version="gemv"), "by awq, to 4 bits for 'gemv' kernels"),
        (changed(awq_config(128), bits=8), "by awq, to 8 bits"),
        (awq_config(48), "by awq, in groups of 48"),
        (
            changed(compressed_config(128, symmetric=True), format="marlin-24"),
            "in the format 'marlin-24'",
        ),
        (with_scheme(num_bits=8), "another scheme than one of 4-bit weights"),
        (with_scheme(actorder="group"), "another scheme"),
        (with_scheme(type="float"), "another scheme"),
        (with_scheme(group_size=16), "in groups of 16"),
    ],
)
def test_other_layouts_are_refused(
    quantization: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    config = {"model_type": "llava", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=sentence) as told:
        llava_config(tmp_path)
    assert "give the one it was made from" in str(told.value)
