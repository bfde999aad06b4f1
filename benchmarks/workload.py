"""What every way of answering is asked: a checkpoint, pictures and questions."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from benchmarks.pictures import encoded, noise
from demo.random_checkpoint import DEMO, write_random_llava
from llava_triton.device import compute_dtype, default_device

PICTURE_PIXELS = 336


@dataclass(frozen=True)
class Geometry:
    """A LLaVA's size."""

    vision: dict[str, int]
    text: dict[str, Any]
    family: type[PreTrainedConfig] = LlamaConfig
    """Of the text model."""


FULL = Geometry(
    vision={
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 14,
    },
    text={
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 4096,
    },
)
"""256 tokens a picture; 86 million parameters of text model."""
QUICK = Geometry(
    vision={
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 56,
        "patch_size": 14,
    },
    text={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
)
"""For a test of the benchmark itself: its figures say nothing about speed."""
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""ViT-L/14: 576 tokens a picture."""
LLAVA_15_7B = Geometry(
    vision=CLIP_LARGE_336,
    text={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32064,
    },
)
"""Every head has keys and values of its own: 512 KiB a token in half types."""
LLAVA_16_MISTRAL_7B = Geometry(
    vision=CLIP_LARGE_336,
    text={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "vocab_size": 32064,
    },
    family=MistralConfig,
)
"""Its text model, four heads to each of keys and values, behind one view of the picture."""
GEOMETRIES = {
    "quick": QUICK,
    "cpu": FULL,
    "llava-1.5-7b": LLAVA_15_7B,
    "llava-1.6-mistral-7b": LLAVA_16_MISTRAL_7B,
}
"""By the names that the commands take."""


@dataclass(frozen=True)
class Workload:
    """Sessions to be held; every process of a run reads the same one from a file."""

    checkpoint: str
    """Directory of the checkpoint."""
    repository: str
    """Directory of the Triton model repository exported from it."""
    dtype: str = "float32"
    """That the answers are computed in, as in `Settings.dtype`."""
    turns: int = 8
    """Of a session; the picture comes with the first."""
    question_tokens: int = 24
    answer_tokens: int = 32
    streams: int = 16
    """Long answers on their way when the long prompt comes (the fairness part)."""
    stream_tokens: int = 600
    """Of each long answer."""
    prompt_tokens: int = 2000
    """Of the long prompt."""
    contexts: Sequence[int] = (300, 1000, 2000, 3500)
    """Tokens said before the turns whose first token is measured (the growth part)."""
    idle_sessions: Sequence[int] = (1, 100, 1000, 10_000)
    """Open beside such turns, ascending."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Workload:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))

    @cached_property
    def _words(self) -> list[str]:
        return whole_words(AutoTokenizer.from_pretrained(self.checkpoint))

    def question(self, load: int, session: int, turn: int) -> str:
        """The question of `question_tokens` tokens; another one for every session and turn.

        Args:
            load: sessions at once in this part of the run; 0 for the warm-up.
            session: number of the session in it.
            turn: from 0.
        """
        return self.text(self.question_tokens, f"{load} {session} {turn}")

    def text(self, tokens: int, seed: str) -> str:
        """A text of exactly so many tokens."""
        return " ".join(random.Random(seed).choices(self._words, k=tokens))

    def picture(self, load: int, session: int) -> bytes:
        """An encoded picture (PNG), another one for every session, so that none can be reused."""
        size = (PICTURE_PIXELS, PICTURE_PIXELS)
        return encoded(noise(size, (12, 12), [load, session]), "PNG")


def whole_words(tokenizer: Any) -> list[str]:
    """Words that are one token each: alone at the beginning of a text, and behind a space."""
    words = []
    for token in sorted(tokenizer.get_vocab()):
        word = token.removeprefix("\u0120")  # how byte-level tokenizers write a leading space
        if word.isascii() and word.isalpha():
            lengths = [
                len(tokenizer(text, add_special_tokens=False)["input_ids"])
                for text in (word, f" {word}")
            ]
            if lengths == [1, 1]:
                words.append(word)
    return sorted(set(words))


def write_checkpoint(
    directory: Path,
    geometry: Geometry,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Path:
    """A checkpoint with random weights, every token of whose answers can be read at once.

    A model with random weights would say mostly bytes that make no character, which a server holds
    back: a client could not see when a token comes. So the rows of its last matrix are 0 for
    everything but readable tokens, which makes those the likeliest; it computes as much as before.
    (Where the vocabulary is larger than the tokenizer's, that goes for the rest of it, too. Drawn
    at a temperature instead of greedily, such tokens would come, and read as nothing.)
    Nor does such a model ever end its answer.

    Args:
        directory: where to write.
        geometry: of the model.
        dtype: of the weights.
        device: where they are drawn; large models want a GPU.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    vocabulary = geometry.text.get("vocab_size", len(tokenizer))
    unsaid = [token for token in range(vocabulary) if not _is_readable(tokenizer, token)]
    return write_random_llava(
        directory,
        CLIPVisionConfig(**geometry.vision),
        geometry.family,
        geometry.text,
        least_deviation=0.0,
        dtype=dtype,
        device=device,
        unsaid=unsaid,
    )


def _is_readable(tokenizer: Any, token: int) -> bool:
    if token >= len(tokenizer):
        return False
    text = tokenizer.decode([token], skip_special_tokens=True)
    return bool(text.strip()) and text.isascii() and text.isprintable()


def main() -> int:
    """Write a checkpoint in the dtype that the default device computes in, made on it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint's directory")
    options = parser.parse_args()
    device = default_device()
    dtype = compute_dtype("auto", device)
    write_checkpoint(options.output, GEOMETRIES[options.geometry], dtype, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
