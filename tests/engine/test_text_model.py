"""The text model computed here against transformers', in the shapes that checkpoints come in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from demo.random_checkpoint import write_random_llava
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.contract.settings import WEIGHTS
from llava_triton.kernels import kernels_for
from llava_triton.kernels.cpu.attention import add_rms_norm, silu_multiply
from llava_triton.kernels.layers import HiddenStates, OneByOne, Stack
from llava_triton.model.text_model import TextModel
from tests.engine_harness import EngineHarness
from tests.reference import TransformersChat
from tests.unit.test_paged_attention import Step

VISION = CLIPVisionConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=56,
    patch_size=14,
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LONG_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0}
LONG_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG_ROPE |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 128}
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": (LlamaConfig, {"head_dim": 40}),
    "llama 3's rotation": (LlamaConfig, {"rope_parameters": LONG_ROPE}),
    "yarn's rotation": (LlamaConfig, {"rope_parameters": YARN}),
    "linear rotation": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral with a window": (MistralConfig, {"sliding_window": 21}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with windows above": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_equal_transformers(name: str, tmp_path: Path) -> None:
    config, options = SHAPES[name]
    checkpoint = write_random_llava(tmp_path / "model", VISION, config, TEXT | options, seed=5)
    reference = TransformersChat(checkpoint)
    harness = EngineHarness(checkpoint, prefill_chunk_tokens=16)
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    try:
        for index, question in enumerate(("What is it?", "How many are there, and where?")):
            images = [picture] if index == 0 else []
            expected = reference.ask(question, images, max_tokens=20)
            text, final = harness.ask("s", question, images, start=index == 0, max_tokens=20)
            assert text == reference.decode(expected)
            assert final.num_output_tokens == len(expected)
    finally:
        harness.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["llama with biases", "llama with wide heads", "qwen2"])
def test_all_layers_in_one_call_equal_one_operation_after_another(
    name: str, dtype: torch.dtype, weights: str, tmp_path: Path
) -> None:
    config, options = SHAPES[name]
    checkpoint = write_random_llava(tmp_path / "model", VISION, config, TEXT | options, seed=5)
    kernels = kernels_for(torch.device("cpu"))
    ways: list[HiddenStates] = []

    def both(stack: Stack) -> HiddenStates:
        ways.extend([kernels.join(stack), OneByOne(stack, add_rms_norm, silu_multiply)])
        return ways[0]

    with patch("llava_triton.model.text_model.kernels_for") as made:
        made.return_value = replace(kernels, join=both)
        loaded = load_checkpoint(checkpoint, dtype=dtype)
        model = TextModel(loaded, weights=weights)

    def run(sequences: list[tuple[int, int]], wanted: torch.Tensor | None = None) -> torch.Tensor:
        results = []
        for way in ways:
            step = Step.make(model.geometry, sequences, dtype)
            torch.manual_seed(0)
            keys, values = (torch.stack([each] * model.layers) for each in (step.keys, step.values))
            embeddings = torch.randn(len(step.qkv), TEXT["hidden_size"]).to(dtype)
            results.append((way(embeddings, keys, values, step.rows, wanted), keys, values))
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert not results[0][0].isnan().any()
        return results[0][0]

    # A prompt, answers in flight, and again fewer tokens: what is kept between steps is larger.
    run([(0, 40), (17, 1), (64, 1)])
    run([(30, 1), (5, 2)])
    # Some tokens' results alone, as many as are multiplied in the same way as all.
    sequences, wanted = [(0, 40), (5, 30), (17, 1)], torch.tensor([0, *range(20, 40), 70])
    assert torch.equal(run(sequences, wanted), run(sequences)[wanted])


def test_bfloat16_agrees_roughly(tmp_path: Path) -> None:
    checkpoint = write_random_llava(
        tmp_path / "model", VISION, LlamaConfig, TEXT, least_deviation=0.0
    )
    first: list[list[int]] = []
    for dtype in ("float32", "bfloat16"):
        harness = EngineHarness(checkpoint, dtype=dtype)
        try:
            harness.ask("s", "What is it?", start=True, max_tokens=8, ignore_eos=True)
            first.append(harness.history("s"))
        finally:
            harness.shutdown()
    assert first[0][:-7] == first[1][:-7]  # prompt and first token: later ones may drift apart


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (LlamaConfig, {"hidden_act": "gelu"}, "activation is 'gelu'"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embedding is 'dynamic'",
        ),
        (GemmaConfig, {"head_dim": 16}, "family 'gemma'"),
    ],
)
def test_what_is_not_computed_here_is_refused(
    config: type[PreTrainedConfig], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    checkpoint = write_random_llava(tmp_path / "model", VISION, config, TEXT | options)
    with pytest.raises(ValueError, match=sentence):
        TextModel(load_checkpoint(checkpoint))
