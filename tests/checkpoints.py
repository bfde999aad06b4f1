"""Tiny LLaVA checkpoints with random weights, in shapes that the demo checkpoint does not have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from demo.write_checkpoint import write_llava_checkpoint

DEMO = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}
PATCH = 14
HEADS = 4


def tiny_llava(
    directory: Path,
    *,
    text: str = "llama",
    kv_heads: int = HEADS,
    image_size: int = 56,
    seed: int = 0,
    **llava_options: Any,
) -> Path:
    """Write a whole random checkpoint: model, tokenizer, chat template, image processor.

    It shares the demo checkpoint's tokenizer and chat template, so `tests.reference` can talk to
    it. Its weights are float32 and wide enough that greedy answers vary with picture and question
    and have no near ties, which another order of additions could turn.

    Args:
        directory: where to write; made if need be.
        text: family of the language model, a key of `TEXT_CONFIGS`.
        kv_heads: key-value heads under its 4 attention heads: 4 (no grouping), 2 or 1.
        image_size: pixels a side, a multiple of 14; a picture is (image_size / 14)^2 tokens.
        seed: of the weights.
        llava_options: more fields of `LlavaConfig`, such as `vision_feature_layer=[-3, -1]`.

    Returns:
        `directory`.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    vision_config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=PATCH,
    )
    text_config = TEXT_CONFIGS[text](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // PATCH) ** 2,
        **llava_options,
    )
    model = LlavaForConditionalGeneration(config).eval()
    _randomize(model, seed)
    write_llava_checkpoint(model, directory, torch.float32)
    _write_processor(directory, image_size)
    return directory


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Normal weights of standard deviation 0.5 / sqrt(inputs) or more, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            mean, deviation = 1.0, 0.1
        elif parameter.dim() < 2:
            mean, deviation = 0.0, 0.1
        else:
            mean, deviation = 0.0, max(0.25, parameter[0].numel() ** -0.5)
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = mean + deviation * values


def _write_processor(directory: Path, image_size: int) -> None:
    """The demo's tokenizer and template, and its image processor at another size.

    The latter in a `preprocessor_config.json` of its own, where most published checkpoints have it.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, directory / name)
    processor = json.loads((DEMO / "processor_config.json").read_text())
    image_processor = processor.pop("image_processor")
    image_processor["size"] = {"shortest_edge": image_size}
    image_processor["crop_size"] = {"height": image_size, "width": image_size}
    processor["patch_size"] = PATCH
    _write_json(directory / "preprocessor_config.json", image_processor)
    _write_json(directory / "processor_config.json", processor)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
