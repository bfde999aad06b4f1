"""LLaVA checkpoints of any geometry with random weights, for tests and benchmarks.

They share the demo checkpoint's tokenizer and chat template.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from demo.write_checkpoint import write_llava_checkpoint
from llava_triton.checkpoint.families import FAMILIES, VideoFamily

NEXT_GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
GRIDS = {
    "llava_next": NEXT_GRIDS,
    "llava_next_video": NEXT_GRIDS,
    "llava_onevision": [(lines, columns) for lines in range(1, 7) for columns in range(1, 7)],
}
"""Lines and columns of tiles that the published checkpoints of a family cut pictures into."""

PROCESSORS = {
    # Of pictures, of all together.
    "llava_next": ("LlavaNextImageProcessor", "LlavaNextProcessor"),
    "llava_next_video": ("LlavaNextImageProcessor", "LlavaNextVideoProcessor"),
    "llava_onevision": ("LlavaOnevisionImageProcessor", "LlavaOnevisionProcessor"),
}

DEMO = Path(__file__).parent / "checkpoint"


def write_random_llava(
    directory: Path,
    vision: CLIPVisionConfig | SiglipVisionConfig,
    text_class: type[PreTrainedConfig],
    text: dict[str, Any],
    *,
    family: str = "llava",
    seed: int = 0,
    least_deviation: float = 0.25,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    unsaid: Sequence[int] = (),
    **llava_options: Any,
) -> Path:
    """Write a whole random checkpoint: model, tokenizer, chat template, image processor.

    In narrow models its weights are wide enough that greedy answers vary with picture and question
    and have no near ties, which another order of additions could turn.

    Args:
        directory: where to write; made if need be.
        vision: geometry of the tower.
        text_class: configuration class of the language model: LlamaConfig, MistralConfig, ...
        text: its geometry; special tokens are the demo tokenizer's, and so is the vocabulary, if
            no larger `vocab_size` is given.
        family: `model_type` of the checkpoint.
        seed: of the weights.
        least_deviation: of the weights of a matrix; by default far more than 1 / sqrt(inputs), so
            that narrow models are lively. Wide ones become chaotic by it: give 0 for them.
        dtype: of the weights, from the beginning to the file.
        device: where they are drawn. Another device or dtype gives other weights; a large model is
            drawn in seconds on a GPU, in half an hour on a CPU.
        unsaid: tokens whose rows of the last matrix are 0: others are likelier.
        llava_options: more fields of the family's configuration, such as
            `vision_feature_layer=[-3, -1]`.

    Returns:
        `directory`.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    side = vision.image_size
    pinpoints = [[lines * side, columns * side] for lines, columns in GRIDS.get(family, ())]
    if pinpoints:
        llava_options = {"image_grid_pinpoints": pinpoints} | llava_options
    if family != "llava_onevision":
        llava_options["image_seq_length"] = (side // vision.patch_size) ** 2
    vocabulary = len(tokenizer)
    if issubclass(FAMILIES[family], VideoFamily):  # a placeholder that nothing can spell
        llava_options = {"video_token_index": vocabulary} | llava_options
        vocabulary += 1
    config = FAMILIES[family].config_class(
        vision_config=vision,
        text_config=text_class(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **({"vocab_size": vocabulary} | text),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **llava_options,
    )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    _randomize(model, seed, least_deviation)
    model.lm_head.weight.data[list(unsaid)] = 0.0
    write_llava_checkpoint(model, directory, dtype)
    _write_processor(directory, vision, family, pinpoints)
    return directory


def _randomize(model: torch.nn.Module, seed: int, least_deviation: float) -> None:
    """Normal weights of standard deviation 1 / sqrt(inputs) or more, small biases."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            mean, deviation = 1.0, 0.1
        elif parameter.dim() < 2:
            mean, deviation = 0.0, 0.1
        else:
            mean, deviation = 0.0, max(least_deviation, parameter[0].numel() ** -0.5)
        values = torch.randn(parameter.shape, generator=generator, device=device)
        parameter.data = (mean + deviation * values).to(parameter.dtype)


def _write_processor(
    directory: Path,
    vision: CLIPVisionConfig | SiglipVisionConfig,
    family: str,
    pinpoints: list[list[int]],
) -> None:
    """The demo's tokenizer and template, and its image processor at another size.

    The latter in a `preprocessor_config.json` of its own, where most published checkpoints have it.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, directory / name)
    processor = json.loads((DEMO / "processor_config.json").read_text())
    image_processor = processor.pop("image_processor")
    square = {"height": vision.image_size, "width": vision.image_size}
    if isinstance(vision, SiglipVisionConfig):
        image_processor = {
            "image_processor_type": "SiglipImageProcessor",
            "size": square,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
    else:
        image_processor["size"] = {"shortest_edge": vision.image_size}
        image_processor["crop_size"] = square
    processor["patch_size"] = vision.patch_size
    if pinpoints:
        kind, processor["processor_class"] = PROCESSORS[family]
        image_processor["image_processor_type"] = kind
        image_processor["image_grid_pinpoints"] = pinpoints
    if issubclass(FAMILIES[family], VideoFamily):
        of_frames = {"size", "crop_size", "do_center_crop", "image_mean", "image_std"}
        video_processor = {name: image_processor.get(name) for name in of_frames}
        video_processor["video_processor_type"] = processor["processor_class"].replace(
            "Processor", "VideoProcessor"
        )
        _write_json(directory / "video_preprocessor_config.json", video_processor)
    _write_json(directory / "preprocessor_config.json", image_processor)
    _write_json(directory / "processor_config.json", processor)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
