"""transformers' `generate` on whole conversations: what our engine is compared with.

As a way of answering it is used as people use it without a server, with and without a kept cache:
on the GPU where there is one, else with as many threads as torch takes; in the dtype that our
engine has beside it, with the fused attention and OpenMP's own way of waiting, which is its
fastest. It answers one turn at a time: `generate` cannot take up a second conversation while it
answers the first, so what it does with one session is all it can do.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from benchmarks.load import Answer, Ask, Way
from benchmarks.script import turn_text
from llava_triton.contract.delta import Delta


class Transformers:
    """A checkpoint in transformers.

    Args:
        checkpoint: its directory.
        device: where to compute.
        dtype: in what.
    """

    def __init__(self, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> None:
        model: Any = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="sdpa"
        )
        self.model = model.eval().to(device)
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)

    @cached_property
    def _exact(self) -> Any:
        """The same weights, computed in float32; made when a difference is to be looked at."""
        return copy.deepcopy(self.model).float()

    def pixels(self, pictures: Sequence[bytes]) -> Tensor:
        """[N, 3, H, W] in host memory."""
        images = [Image.open(io.BytesIO(each)).convert("RGB") for each in pictures]
        processed = self.processor.image_processor(images, return_tensors="pt")
        return torch.as_tensor(processed["pixel_values"])

    @torch.inference_mode()
    def features(self, encoded: bytes) -> Tensor:
        """One picture's [T, D], by transformers' vision tower."""
        config = self.model.config
        output = self.model.model.get_image_features(
            pixel_values=self.pixels([encoded]).to(self.model.device, self.model.dtype),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        features: Tensor = output.pooler_output[0]
        return features

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], pixels: Tensor | None, tokens: int, **options: Any
    ) -> Any:
        """What `generate` returns for token IDs and the pictures' pixels, greedily."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        pictures = {}
        if pixels is not None:
            pictures["pixel_values"] = pixels.to(self.model.device, self.model.dtype)
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **pictures,
            max_new_tokens=tokens,
            do_sample=False,
            **options,
        )

    def answer(
        self, prompt: Sequence[int], pictures: Sequence[bytes], tokens: int
    ) -> tuple[list[int], list[Tensor]]:
        """The greedy answer to token IDs, and the logits [V] before each of its tokens."""
        output = self.generate(
            prompt,
            self.pixels(pictures) if pictures else None,
            tokens,
            # A picture is nothing that a model can say; the engine rules it out likewise.
            suppress_tokens=[self.model.config.image_token_id],
            output_logits=True,
            return_dict_in_generate=True,
        )
        chosen = [int(token) for token in output.sequences[0, len(prompt) :]]
        return chosen, [each[0].float() for each in output.logits]

    @torch.inference_mode()
    def exact_logits(self, ids: Sequence[int], pictures: Sequence[bytes]) -> Tensor:
        """What follows the token IDs, computed in float32, [V]."""
        given = torch.tensor([list(ids)], device=self.model.device)
        inputs = {}
        if pictures:  # rounded as the model's dtype has them, for both
            pixels = self.pixels(pictures).to(self.model.device, self.model.dtype)
            inputs["pixel_values"] = pixels.float()
        output = self._exact(input_ids=given, attention_mask=torch.ones_like(given), **inputs)
        logits: Tensor = output.logits[0, -1].float()
        return logits


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` has chosen each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """The prompt, then every token."""
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing to do."""


@dataclass
class _Conversation:
    picture: bytes
    ids: list[int] = field(default_factory=list)
    pixels: Tensor | None = None
    cache: Any = None
    """Keys and values, where they are kept."""


class TransformersWay(Way):
    """Sessions that open on one picture, each turn answered before `ask` returns.

    Args:
        reference: the model.
        kept: keep keys and values from turn to turn; else compute everything at every turn.
    """

    def __init__(self, reference: Transformers, *, kept: bool) -> None:
        self._reference = reference
        self._kept = kept
        config = reference.model.config.vision_config
        self._image_tokens = (config.image_size // config.patch_size) ** 2
        self._open: dict[int | str, _Conversation] = {}

    def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        """See `Way`. The answer has exactly `max_tokens` tokens: the benchmark's checkpoints never
        say their end-of-sequence token."""
        answer, reference = answer or Answer(), self._reference
        if ask.start:
            config = reference.model.config.get_text_config()
            cache = DynamicCache(config=config) if self._kept else None
            self._open[ask.session_id] = _Conversation(ask.images[0], cache=cache)
        held = self._open[ask.session_id]
        if held.pixels is None or not self._kept:
            held.pixels = reference.pixels([held.picture])
        held.ids += self._message(str(ask.text), ask.start)
        clock = TokenClock()
        cached = held.cache.get_seq_length() if held.cache is not None else 0
        output = reference.generate(
            held.ids,
            held.pixels if cached == 0 else None,
            ask.sampling["max_tokens"],
            past_key_values=held.cache,
            streamer=clock,
        )
        said = [int(token) for token in output[0, len(held.ids) :]]
        text = reference.processor.tokenizer.decode(said, skip_special_tokens=True)
        first_ms = (clock.times[0] - answer.asked_at) * 1000.0
        for number, at in enumerate(clock.times, 1):
            last = number == len(said)
            shown = str(text).removeprefix(" ") if last else ""
            piece = Delta(shown, "", len(held.ids), number, cached, first_ms)
            answer.take(replace(piece, finish_reason="length") if last else piece, at)
        held.ids += said
        if ask.end:
            del self._open[ask.session_id]
        answer.end()
        return answer

    def close(self) -> None:
        """Forget all conversations."""
        self._open.clear()

    def _message(self, question: str, start: bool) -> list[int]:
        tokenizer = self._reference.processor.tokenizer
        text = turn_text(question, start=start, image_tokens=self._image_tokens)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
