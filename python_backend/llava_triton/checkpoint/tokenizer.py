"""A checkpoint's tokenizer with its chat template, wherever that is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llava_triton.checkpoint.weights import CheckpointError, unusable


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a checkpoint's directory.

    Not by `AutoProcessor`: LLaVA-OneVision's has a video processor, which needs torchvision.

    Raises:
        CheckpointError: there is none, none that is loaded without running the checkpoint's own
            code, or no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.chat_template = _template_of_processor(directory) or tokenizer.chat_template
    except (OSError, ValueError, KeyError) as error:
        raise unusable(directory, "tokenizer", error) from error
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{directory} has no chat template, so questions cannot be put to the model; add the "
            "chat_template.jinja of the checkpoint that it was made from"
        )
    return tokenizer


def check_video_template(directory: Path, tokenizer: Any, config: Any) -> None:
    """Compare how a checkpoint's chat template shows a video with how it shows a picture.

    A video takes a picture's place in a rendered message, whose placeholder's ID nothing depends
    on: features stand there. So the two must be alike in all but the placeholder.

    Raises:
        CheckpointError: they are not.
    """
    question = {"type": "text", "text": "?"}

    def rendered(*kinds: str) -> str:
        content = [*({"type": kind} for kind in kinds), question]
        return str(
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        )

    names = tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
    picture, video = (str(each) for each in names)
    shown = rendered("video")
    # Many templates leave out what they do not know.
    if shown not in (rendered(), rendered("image").replace(picture, video)):
        raise CheckpointError(
            f"{directory} has a chat template that shows a video otherwise than a picture, with "
            f"more than {video} in the place of {picture}; give a checkpoint whose template does "
            "not"
        )


def _template_of_processor(directory: Path) -> Any:
    """Published checkpoints keep the template with the processor, the tokenizer or both."""
    for name in ("processor_config.json", "chat_template.json"):
        file = directory / name
        template = json.loads(file.read_text()).get("chat_template") if file.is_file() else None
        if template:
            return template
    file = directory / "chat_template.jinja"
    return file.read_text() if file.is_file() else None
