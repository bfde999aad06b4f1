"""Generated pictures and conversations as tensors to learn from."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from demo.conversations import Conversation, random_conversation
from demo.shapes import COLORS, FORMS, MAX_SHAPES, SIZES, Scene, draw, random_scene

# Training, validation while training, and demo/evaluate.py never share a random stream.
TRAINING, COUNTING = "training", "counting"
VALIDATION, EVALUATION = "validation", "evaluation"
# "Nothing here" comes before the values of a property.
PROPERTIES = {"form": FORMS, "color": tuple(COLORS), "size": tuple(SIZES)}


def stream(purpose: str, index: int) -> random.Random:
    """The source of randomness for one example."""
    return random.Random(f"{purpose} {index}")


def picture(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene drawn at some size, sometimes with the damage that JPEG does."""
    image = draw(scene, rng.randint(100, 256))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(50, 95))
        image = Image.open(buffer)
    return image


def pixels(images: list[Image.Image], processor: LlavaProcessor) -> NDArray[np.uint8]:
    """The images as the checkpoint's image processor resizes and crops them, in bytes."""
    processed = processor.image_processor(
        images, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"]
    return np.asarray(processed, dtype=np.uint8)


def normalized(raw: torch.Tensor, processor: LlavaProcessor) -> torch.Tensor:
    """The rest of the image processor's work: bytes to the values that the model sees."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(processor.image_processor.image_mean, device=raw.device).view(shape)
    std = torch.tensor(processor.image_processor.image_std, device=raw.device).view(shape)
    return (raw.float() / 255 - mean) / std


def encode(
    conversation: Conversation, processor: LlavaProcessor, image_tokens: int
) -> list[list[int]]:
    """Token ids, a list for every question followed by one for its answer.

    Joined, they are what the processor makes of the conversation; that an answer's tokens never
    merge with its question's is what makes the pieces safe to encode on their own.
    """
    pieces = []
    for turn in conversation.turns:
        shown = "<image>" * image_tokens + "\n" if turn.picture else ""
        pieces.append(f"USER: {shown}{turn.question} ASSISTANT:")
        pieces.append(f" {turn.answer}</s>")
    encoded = processor.tokenizer(pieces, add_special_tokens=False)["input_ids"]
    encoded[0].insert(0, processor.tokenizer.bos_token_id)
    return list(encoded)


@dataclass
class Batch:
    """Right-padded conversations. ``turn`` is 1, 2, ... on an answer's tokens, elsewhere 0."""

    tokens: torch.Tensor
    turn: torch.Tensor
    pixels: torch.Tensor


def make_batch(
    purpose: str,
    first: int,
    count: int,
    length: int,
    processor: LlavaProcessor,
    image_tokens: int,
    max_shapes: int = MAX_SHAPES,
) -> Batch:
    """Conversations number ``first`` and following, each cut to at most ``length`` tokens."""
    tokens = torch.full((count, length), processor.tokenizer.pad_token_id)
    turn = torch.zeros((count, length), dtype=torch.long)
    images = []
    for row in range(count):
        rng = stream(purpose, first + row)
        conversation = random_conversation(
            rng, length // 18, max_shapes, counting=0.5 if purpose == COUNTING else 0.0
        )
        pieces = encode(conversation, processor, image_tokens)
        scenes = list(conversation.scenes)
        at = 0
        for index, made in enumerate(conversation.turns):
            question, answer = pieces[2 * index : 2 * index + 2]
            after = at + len(question) + len(answer)
            if after > length:
                break
            if made.picture:
                images.append(picture(scenes.pop(0), rng))
            tokens[row, at:after] = torch.tensor(question + answer)
            turn[row, at + len(question) : after] = index + 1
            at = after
    used = int((turn > 0).any(dim=0).nonzero().max()) + 1
    return Batch(tokens[:, :used], turn[:, :used], torch.from_numpy(pixels(images, processor)))


class ConversationBatches(Dataset[Batch]):
    """Training batches; one in four has conversations twice as long, and half as many.

    Of those for ``TRAINING`` the first show few shapes: answers about the only shape in a picture
    teach where to look at all, before there is a choice of where to look. Those for ``COUNTING``
    ask about numbers half of the time.
    """

    def __init__(
        self,
        purpose: str,
        count: int,
        size: int,
        length: int,
        processor: LlavaProcessor,
        image_tokens: int,
    ) -> None:
        self.purpose, self.count, self.size, self.length = purpose, count, size, length
        self.processor, self.image_tokens = processor, image_tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        long = index % 4 == 3
        size, length = (self.size // 2, 2 * self.length) if long else (self.size, self.length)
        done = index / self.count
        easy = self.purpose == TRAINING
        max_shapes = 2 if easy and done < 0.1 else 3 if easy and done < 0.2 else MAX_SHAPES
        return make_batch(
            self.purpose,
            index * self.size,
            size,
            length,
            self.processor,
            self.image_tokens,
            max_shapes,
        )


class PictureBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pictures, and for each of the nine cells the class of each property."""

    def __init__(self, count: int, size: int, processor: LlavaProcessor) -> None:
        self.count, self.size, self.processor = count, size, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        classes = torch.zeros((self.size, 9, len(PROPERTIES)), dtype=torch.long)
        images = []
        for row in range(self.size):
            rng = stream("pictures", index * self.size + row)
            scene = random_scene(rng)
            images.append(picture(scene, rng))
            for shape in scene.shapes:
                for column, (name, values) in enumerate(PROPERTIES.items()):
                    classes[row, shape.cell, column] = values.index(getattr(shape, name)) + 1
        return torch.from_numpy(pixels(images, self.processor)), classes
