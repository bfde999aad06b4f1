"""A checkpoint's config.json: what it is, and whether it can be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from llava_triton.checkpoint.families import FAMILIES, Config
from llava_triton.checkpoint.packed import UnreadPackingError, packing_of
from llava_triton.checkpoint.weights import CONFIG, CheckpointError

TEXT_FAMILIES = ("llama", "mistral", "qwen2")
"""What `llava_triton.model.text_model` computes."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
_ROTATIONS_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on how long the sequence is in the end: cached keys would
go stale."""
_ORIGINAL_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
"""Fields of config.json that only the original code's checkpoints have."""
_CONVERTED = (
    # (what an original checkpoint's name holds, the converted repository)
    ("onevision-qwen2-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
    ("onevision-qwen2-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    ("interleave-qwen-0.5b", "llava-hf/llava-interleave-qwen-0.5b-hf"),
    ("interleave-qwen-7b", "llava-hf/llava-interleave-qwen-7b-hf"),
    ("llama3-llava-next-8b", "llava-hf/llama3-llava-next-8b-hf"),
    ("v1.6-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf"),
    ("v1.6-vicuna-7b", "llava-hf/llava-v1.6-vicuna-7b-hf"),
    ("v1.6-vicuna-13b", "llava-hf/llava-v1.6-vicuna-13b-hf"),
    ("v1.6-34b", "llava-hf/llava-v1.6-34b-hf"),
    ("v1.5-7b", "llava-hf/llava-1.5-7b-hf"),
    ("v1.5-13b", "llava-hf/llava-1.5-13b-hf"),
    ("bakllava", "llava-hf/bakLlava-v1-hf"),
)


def llava_config(directory: Path, name: str | None = None) -> Config:
    """The configuration of a checkpoint that can be served.

    Args:
        directory: the checkpoint's.
        name: on the hub; None for a directory.

    Raises:
        CheckpointError: `config.json` is missing or unreadable, or it is of a checkpoint that
            cannot be served: one sentence says what it is and what would do.
    """
    try:
        raw = json.loads((directory / CONFIG).read_text())
        if not isinstance(raw, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG} cannot be read: {error}") from error
    fault = _fault_of_json(raw, name or directory.name)
    if fault is not None:
        raise CheckpointError(f"{name or directory} is {fault}")
    try:
        config: Config = FAMILIES[raw["model_type"]].config_class.from_pretrained(
            directory, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory / CONFIG} cannot be read: {reason}") from error
    fault = _fault_of_tower(config) or text_model_fault(config.get_text_config())
    if fault is not None:
        raise CheckpointError(f"{name or directory} cannot be served: {fault}")
    return config


def text_model_fault(config: Any) -> str | None:
    """Why a text model of this configuration is not served; None: it is."""
    if config.model_type not in TEXT_FAMILIES:
        return (
            f"its text model is of the family {config.model_type!r}; served are "
            f"{', '.join(TEXT_FAMILIES)}"
        )
    if config.hidden_act != "silu":
        return f"its text model's activation is {config.hidden_act!r}; served is 'silu'"
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation in _ROTATIONS_BY_LENGTH:
        return (
            f"its text model's rotary embedding is {rotation!r}, whose angles change as a "
            "conversation grows; give a checkpoint with another"
        )
    return None


def _fault_of_json(raw: dict[str, Any], name: str) -> str | None:
    kind = raw.get("model_type")
    served = ", ".join(FAMILIES)
    if any(key in raw for key in _ORIGINAL_KEYS):
        names = f"{name} {raw.get('_name_or_path', '')}".lower()
        converted = next((to for part, to in _CONVERTED if part in names), None)
        return (
            "a checkpoint in the layout of the original LLaVA code (config.json names "
            f"mm_vision_tower and the like), which transformers does not load; give "
            f"{converted or 'the converted one of huggingface.co/llava-hf, whose name ends in -hf'}"
        )
    if kind not in FAMILIES:
        return f"a checkpoint of type {kind!r}; give one whose config.json has model_type {served}"
    try:
        packing_of(raw)
    except UnreadPackingError as how:
        return (
            f"a checkpoint quantized by {how}, whose weights are not read: of quantized ones those "
            'of awq (version "gemm") and of compressed-tensors ("pack-quantized") are, with 4 bits '
            'in groups; give the one it was made from, and the setting "weights": "int4" if '
            "memory is short"
        )
    return None


def _fault_of_tower(config: Any) -> str | None:
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        return f"its vision tower is of the type {kind!r}; served are {', '.join(TOWERS)}"
    return None
