"""A LLaVA checkpoint that is about to be loaded: all of it is checked, and nothing read yet."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.tokenizer import load_tokenizer
from llava_triton.checkpoint.vision_tower import checked_skeleton
from llava_triton.checkpoint.weights import CheckpointError, CheckpointWeights


@dataclass(frozen=True)
class Checkpoint:
    """A LLaVA checkpoint, and where its text model is to compute."""

    skeleton: Any
    """transformers' class of its family, `LlavaForConditionalGeneration` for one, on the device
    "meta": its weights have shapes and no numbers."""
    weights: CheckpointWeights
    """Where the numbers are."""
    tokenizer: Any
    """The checkpoint's fast tokenizer, with its chat template."""
    dtype: torch.dtype
    device: torch.device


def load_checkpoint(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Open a checkpoint's directory.

    Raises:
        ValueError: it is no LLaVA checkpoint, or a weight is missing, unexpected or of the wrong
            shape.
    """
    try:
        config = llava_config(directory)
        weights = CheckpointWeights(directory)
        skeleton = checked_skeleton(config, weights)
        with contextlib.suppress(OSError):  # without one, the configuration has what there is
            skeleton.generation_config = GenerationConfig.from_pretrained(directory)
        tokenizer = load_tokenizer(directory)
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{directory} cannot be loaded as a LLaVA checkpoint: {error}") from error
    return Checkpoint(skeleton, weights, tokenizer, dtype, torch.device(device))
