"""Tiny LLaVA checkpoints with random weights, in shapes that the demo checkpoint does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from demo.random_checkpoint import DEMO, write_random_llava

__all__ = ["DEMO", "tiny_llava"]

TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}
VISION_CONFIGS: dict[str, type[CLIPVisionConfig | SiglipVisionConfig]] = {
    "clip": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
}
PATCH = 14
HEADS = 4


def tiny_llava(
    directory: Path,
    *,
    family: str = "llava",
    vision: str = "clip",
    text: str = "llama",
    kv_heads: int = HEADS,
    image_size: int = 56,
    seed: int = 0,
    text_options: dict[str, Any] | None = None,
    **llava_options: Any,
) -> Path:
    """Write a whole random checkpoint that `tests.reference` can talk to.

    Args:
        directory: where to write; made if need be.
        family: `model_type` of the checkpoint.
        vision: family of the tower, a key of `VISION_CONFIGS`.
        text: family of the language model, a key of `TEXT_CONFIGS`.
        kv_heads: key-value heads under its 4 attention heads: 4 (no grouping), 2 or 1.
        image_size: pixels a side, a multiple of 14. A picture is (image_size / 14)^2 tokens; one
            less with SigLIP, which has no class token to be left out.
        seed: of the weights.
        text_options: more fields of the language model's configuration.
        llava_options: more fields of the family's configuration, such as
            `vision_feature_layer=[-3, -1]`.

    Returns:
        `directory`.
    """
    tower = VISION_CONFIGS[vision](
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=PATCH,
    )
    geometry = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
    }
    return write_random_llava(
        directory,
        tower,
        TEXT_CONFIGS[text],
        geometry | (text_options or {}),
        family=family,
        seed=seed,
        **llava_options,
    )
