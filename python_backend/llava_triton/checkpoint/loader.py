"""Loading a LLaVA checkpoint, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.tokenizer import load_tokenizer
from llava_triton.checkpoint.weights import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A LLaVA checkpoint in memory."""

    model: Any
    """Transformers' class of its family, `LlavaForConditionalGeneration` for one; in eval mode."""
    tokenizer: Any
    """The checkpoint's fast tokenizer, with its chat template."""


def load_checkpoint(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> Checkpoint:
    """Load a checkpoint's directory.

    Raises:
        ValueError: it is no LLaVA checkpoint, or a weight is missing, unexpected or of the wrong
            shape. transformers would fill a missing weight with random numbers and go on, which
            is how a vision tower saved under another release's names turns into noise.
    """
    try:
        llava_config(directory)
        model, report = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,
        )
        tokenizer = load_tokenizer(directory)
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{directory} cannot be loaded as a LLaVA checkpoint: {error}") from error
    faults = {kind: names for kind, names in report.items() if names and kind != "error_msgs"}
    if faults or report.get("error_msgs"):
        found = faults or report["error_msgs"]
        raise ValueError(f"{directory} does not fit this release of transformers: {found}")
    return Checkpoint(model=model.eval().to(device), tokenizer=tokenizer)
