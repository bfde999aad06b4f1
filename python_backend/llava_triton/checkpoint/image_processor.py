"""A checkpoint's own image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# From its own module: transformers 5.17 exports it at the top only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_triton.checkpoint.weights import unusable


def load_image_processor(directory: Path) -> Any:
    """The image processor of a checkpoint's directory.

    Always the one that computes with Pillow: the torchvision one resizes a little differently,
    and answers should not depend on whether torchvision happens to be installed.

    Args:
        directory: holds the checkpoint's `preprocessor_config.json` or `processor_config.json`.

    Raises:
        CheckpointError: there is none that is loaded without running the checkpoint's own code.
    """
    try:
        return AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unusable(directory, "image processor", error) from error
