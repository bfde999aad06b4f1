"""transformers' `generate` as it is used without a server, with and without a kept cache.

Both get the GPU where there is one, else as many threads as torch takes; the dtype that our engine
has beside them, the fused attention, and OpenMP's own way of waiting, which is their fastest. They
answer one turn at a time: `generate` cannot take up a second conversation while it answers the
first, so what they do with one session is all they can do.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from benchmarks.measurement import (
    Load,
    TurnTimes,
    mean_gap_ms,
    part_arguments,
    run_loads,
    write_loads,
)
from benchmarks.processes import device_memory_mib, this_process
from benchmarks.workload import Workload
from llava_triton.device import default_device


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` has chosen each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then every token."""
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing to do."""


class Baseline:
    """A checkpoint in transformers.

    Args:
        kept: keep keys and values from turn to turn; else compute everything at every turn.
    """

    def __init__(self, workload: Workload, *, kept: bool) -> None:
        self._workload = workload
        self._kept = kept
        model: Any = LlavaForConditionalGeneration.from_pretrained(
            workload.checkpoint, dtype=getattr(torch, workload.dtype), attn_implementation="sdpa"
        )
        self._model = model.eval().to(default_device())
        self._processor: Any = AutoProcessor.from_pretrained(workload.checkpoint)
        config = self._model.config.vision_config
        self._image_tokens = (config.image_size // config.patch_size) ** 2
        self._session(0, 0, 2)

    def hold(self, workload: Workload, sessions: int) -> Load:
        """One session after the other."""
        began = time.perf_counter()
        turns = [
            turn
            for each in range(sessions)
            for turn in self._session(sessions, each, workload.turns)
        ]
        seconds = time.perf_counter() - began
        return Load(sessions, seconds, this_process().peak_mib, turns, device_memory_mib())

    def _session(self, load: int, session: int, turns: int) -> list[TurnTimes]:
        work = self._workload
        picture = work.picture(load, session)
        ids: list[int] = []
        cache = DynamicCache(config=self._model.config.get_text_config()) if self._kept else None
        pixels = None
        done = []
        for turn in range(turns):
            question = work.question(load, session, turn)
            asked = time.perf_counter()
            if pixels is None or not self._kept:
                pixels = self._pixels(picture)
            ids += self._message(question, turn)
            clock = TokenClock()
            cached = cache.get_seq_length() if cache is not None else 0
            answer = self._generate(ids, pixels if cached == 0 else None, cache, clock)
            done.append(
                TurnTimes(
                    session=session,
                    turn=turn,
                    first_token_ms=(clock.times[0] - asked) * 1000.0,
                    between_tokens_ms=mean_gap_ms(clock.times[0], clock.times[-1], len(answer) - 1),
                    output_tokens=len(answer),
                    cached_tokens=cached,
                    prompt_tokens=len(ids),
                    text=self._decode(answer),
                )
            )
            ids += answer
        return done

    def _generate(
        self, ids: list[int], pixels: torch.Tensor | None, cache: Any, clock: TokenClock
    ) -> list[int]:
        prompt = torch.tensor([ids], device=self._model.device)
        picture = {}
        if pixels is not None:
            picture["pixel_values"] = pixels.to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            # The checkpoint never says its end-of-sequence token: the length alone ends an answer.
            output = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **picture,
                past_key_values=cache,
                max_new_tokens=self._workload.answer_tokens,
                do_sample=False,
                streamer=clock,
            )
        return [int(token) for token in output[0, len(ids) :]]

    def _message(self, question: str, turn: int) -> list[int]:
        """A turn's message as the checkpoint's chat template renders it."""
        opening = "<s>USER: " + "<image>" * self._image_tokens + "\n" if turn == 0 else "</s>USER: "
        text = f"{opening}{question} ASSISTANT:"
        return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pixels(self, picture: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        processed = self._processor.image_processor(image, return_tensors="pt")
        return torch.as_tensor(processed["pixel_values"])

    def _decode(self, answer: list[int]) -> str:
        text = self._processor.tokenizer.decode(answer, skip_special_tokens=True)
        return str(text).removeprefix(" ")


def main() -> int:
    """One baseline under the given loads."""
    parser = part_arguments(__doc__)
    parser.add_argument("--kept", action="store_true", help="keep the cache from turn to turn")
    options = parser.parse_args()
    workload = Workload.read(options.workload)
    baseline = Baseline(workload, kept=options.kept)
    write_loads(options.output, run_loads(workload, options.sessions, baseline.hold))
    return 0


if __name__ == "__main__":
    sys.exit(main())
