"""Loading a LLaVA checkpoint, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration


@dataclass(frozen=True)
class Checkpoint:
    """A LLaVA-1.5-family checkpoint in memory."""

    model: Any
    """`LlavaForConditionalGeneration`, in eval mode."""
    tokenizer: Any
    """The checkpoint's fast tokenizer, with its chat template."""


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> Checkpoint:
    """Load a checkpoint directory or hub name.

    Raises:
        ValueError: it is no LLaVA checkpoint, or a weight is missing, unexpected or of the wrong
            shape. transformers would fill a missing weight with random numbers and go on, which
            is how a vision tower saved under another release's names turns into noise.
    """
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,
        )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} cannot be loaded as a LLaVA checkpoint: {error}") from error
    faults = {kind: names for kind, names in report.items() if names and kind != "error_msgs"}
    if faults or report.get("error_msgs"):
        raise ValueError(
            f"{source} does not fit this release of transformers: {faults or report['error_msgs']}"
        )
    tokenizer = processor.tokenizer
    # Published checkpoints keep the template with the processor, the tokenizer or both.
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ValueError(f"{source} has no chat template; turns cannot be rendered")
    return Checkpoint(model=model.eval().to(device), tokenizer=tokenizer)
