"""The slow reference: plain transformers, everything computed again at every turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_triton.checkpoint.video_processor import load_video_processor
from llava_triton.pictures.frame_pixels import FramePixels

Frames = Sequence[np.ndarray]
"""Of a video, uint8 [H, W, 3] each."""


class TransformersChat:
    """A conversation with a checkpoint by `generate` on the whole of it, float32 on the CPU.

    The history is kept as token IDs: the answers as the model gave them, without the
    end-of-sequence token, and each user message as the LLaVA-1.5 template of the tests'
    checkpoints renders it.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.model = load_reference(checkpoint)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self._checkpoint = checkpoint
        self._ids: list[int] = []
        self._images: list[Image] = []
        self._videos: list[torch.Tensor] = []
        """Pixel values [N, 3, S, S]."""

    def restart(self) -> None:
        """Forget the conversation."""
        self._ids, self._images, self._videos = [], [], []

    def ask(
        self,
        text: str,
        images: Sequence[Image] = (),
        max_tokens: int = 32,
        positions: Sequence[int] | None = None,
        videos: Sequence[Frames] = (),
        **generate: Any,
    ) -> list[int]:
        """The greedy answer's token IDs, end-of-sequence excluded.

        Args:
            text, images: the message.
            max_tokens: of the answer.
            positions: of the last images and videos in the text; the others are before it.
            videos: behind the images; those of a conversation have equally many frames.
            **generate: more arguments of transformers' `generate`.
        """
        self._listen(text, images, positions, videos)
        answer = self._generate(max_tokens, **generate)
        self._ids += answer
        return answer

    def say(
        self,
        text: str,
        images: Sequence[Image] = (),
        *,
        answer: str,
        positions: Sequence[int] | None = None,
        videos: Sequence[Frames] = (),
    ) -> None:
        """Add a turn whose answer was `answer`."""
        self._listen(text, images, positions, videos)
        self._ids += self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]

    def _listen(
        self,
        text: str,
        images: Sequence[Image],
        positions: Sequence[int] | None = None,
        videos: Sequence[Frames] = (),
    ) -> None:
        opening = "</s>" if self._ids else "<s>"
        lengths = [len(self._features(image)) for image in images]
        of_images = sum(lengths)
        for frames in videos:
            pixels = video_pixels(self._checkpoint, frames)
            self._videos.append(pixels)
            lengths.append(len(video_features(self.model, pixels)))
        placeholders = ["<image>" * length for length in lengths]
        inside = list(positions or ())
        before = len(placeholders) - len(inside)
        shown = "".join(f"{each}\n" for each in placeholders[:before])
        for each, position in reversed(list(zip(placeholders[before:], inside, strict=True))):
            text = text[:position] + each + text[position:]
        message = f"{opening}USER: {shown}{text} ASSISTANT:"
        self._images.extend(images)
        ids = self.tokenizer(message, add_special_tokens=False)["input_ids"]
        config = self.model.config
        places = [place for place, each in enumerate(ids) if each == config.image_token_id]
        for place in places[of_images:]:  # the tests' tokenizer knows no name of a video
            ids[place] = config.video_token_id
        self._ids += ids

    def _features(self, image: Image) -> torch.Tensor:
        """[T, D] of a picture, by transformers."""
        return image_features(self.model, self.image_processor, [image])[0]

    @property
    def ids(self) -> list[int]:
        """The conversation so far."""
        return list(self._ids)

    @property
    def num_tokens(self) -> int:
        """Length of the conversation so far."""
        return len(self._ids)

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text, without the space that leads it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).removeprefix(" ")

    def answer(
        self,
        text: str,
        images: Sequence[Image] = (),
        max_tokens: int = 32,
        positions: Sequence[int] | None = None,
        videos: Sequence[Frames] = (),
    ) -> str:
        """The greedy answer as text."""
        return self.decode(self.ask(text, images, max_tokens, positions, videos))

    def _generate(self, max_tokens: int, **generate: Any) -> list[int]:
        inputs = {}
        if self._images:
            inputs = dict(self.image_processor(self._images, return_tensors="pt"))
        if self._videos:
            inputs["pixel_values_videos"] = torch.stack(self._videos)
        config = self.model.config
        video = getattr(config, "video_token_id", None)
        ids = torch.tensor([self._ids])
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                # A picture is nothing that a model can say; the engine rules it out likewise.
                suppress_tokens=[config.image_token_id, *([] if video is None else [video])],
                **generate,
            )
        answer = [int(token) for token in output[0, ids.shape[1] :]]
        eos = self.model.generation_config.eos_token_id
        return answer[:-1] if answer and answer[-1] == eos else answer


def load_reference(checkpoint: Path) -> Any:
    """The checkpoint as plain transformers loads it, in float32."""
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def video_pixels(checkpoint: Path, frames: Frames) -> torch.Tensor:
    """Pixel values [N, 3, S, S]; that they are those of transformers' video processors is shown by
    `tests.unit.test_videos`."""
    pixels = FramePixels(load_video_processor(checkpoint))
    return torch.from_numpy(np.concatenate([pixels.tile(frame) for frame in frames]))


def video_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Features [R, D] of a video, by transformers."""
    with torch.inference_mode():
        return model.model.get_video_features(pixels[None]).pooler_output[0]  # type: ignore[no-any-return]


def image_features(model: Any, image_processor: Any, images: Sequence[Image]) -> list[torch.Tensor]:
    """Features [T, D] of each picture, by transformers' own tower, projector and arrangement."""
    inputs = image_processor(list(images), return_tensors="pt")
    with torch.inference_mode():
        output = model.model.get_image_features(
            **inputs,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    return list(output.pooler_output)
