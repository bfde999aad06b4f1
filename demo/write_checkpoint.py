"""Writes a LLaVA model under the tensor names of the published checkpoints of its family.

``save_pretrained`` of transformers 5 writes the vision tower under names that older releases do
not know; those then fall back to random weights with no more than a warning. Every release reads
the names that ``llava-hf/llava-1.5-7b-hf`` was published with.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Where transformers 5 keeps a part: where the published checkpoints keep it.
PARTS = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    # Newer releases have no module between the tower and its layers.
    "model.vision_tower.": "vision_tower.vision_model.",
}


def published_name(name: str) -> str:
    """The published name of a tensor that the model calls ``name``."""
    for prefix, published in PARTS.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    raise ValueError(f"no published name is known for the tensor {name}")


def write_llava_checkpoint(model: Any, directory: str | Path, dtype: torch.dtype) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors``.

    Args:
        model: transformers' class of its family, such as ``LlavaForConditionalGeneration``.
        directory: where to write; made if need be.
        dtype: of the weights in the file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        # A copy each: the format refuses tensors that share memory, as tied embeddings do.
        published_name(name): tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    file = directory / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # Some releases of safetensors make the file private to its owner.
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
