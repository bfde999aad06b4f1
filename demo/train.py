"""Trains the demo checkpoint from nothing: ``python demo/train.py``.

First the vision tower learns to tell what is in each cell of a picture, as LLaVA starts from a
vision tower that can see. Then the language model learns to answer, from generated conversations
in which only the answers matter; last with more questions about numbers, which are what it learns
slowest. Every seed is fixed.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

# Allows `python demo/train.py` beside `python -m demo.train`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.build import IMAGE_SIDE, PATCH_SIDE, build_model, build_processor, write_processor
from demo.data import (
    COUNTING,
    PROPERTIES,
    TRAINING,
    VALIDATION,
    Batch,
    ConversationBatches,
    PictureBatches,
    make_batch,
    normalized,
)
from demo.muon import Muon
from demo.write_checkpoint import write_llava_checkpoint

PATCHES = IMAGE_SIDE // PATCH_SIDE
SEED = 1
PICTURE_STEPS, PICTURES = 2500, 48
ANSWER_STEPS, COUNTING_STEPS, CONVERSATIONS, TOKENS = 1900, 1200, 32, 224
MUON_RATE, ADAMW_RATE = 0.015, 2e-3
REPORT_EVERY, SAVE_EVERY = 100, 500


def log(text: str) -> None:
    """A line that is in the log at once, also when the log is a file."""
    print(text, flush=True)


def keep_memory() -> None:
    """Have glibc keep freed memory instead of handing it back to the system after every tensor.

    Getting it again, page by page, would be a third of the training time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # The names' values in <malloc.h>.
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)
        mallopt(mmap_max, 0)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic where the hardware has it; elsewhere it would only be slower."""
    fast = True
    if device.type == "cpu":
        cpu = Path("/proc/cpuinfo")
        fast = cpu.exists() and "avx512_bf16" in cpu.read_text()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for all else; warm-up, then a cosine.

    With AdamW alone the vision tower needs several times as many pictures.
    """

    def __init__(self, modules: list[nn.Module], steps: int, rate: float = 1.0) -> None:
        named = [pair for module in modules for pair in module.named_parameters()]
        self.matrices = [p for name, p in named if "layers." in name and p.ndim == 2]
        inside = {id(p) for p in self.matrices}
        self.others = [p for _, p in named if id(p) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(self.matrices, rate * MUON_RATE, decay=0.01),
            torch.optim.AdamW(
                self.others, lr=rate * ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.01
            ),
        ]
        warm_up = max(1, min(100, steps // 10))

        def share(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.01 + 0.99 * 0.5 * (
                1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))
            )

        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in self.optimizers
        ]

    def step(self, loss: torch.Tensor) -> None:
        """One update."""
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()


class Progress:
    """Prints a line now and then, with the time that is left."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.start, self.losses = (
            name,
            steps,
            time.monotonic(),
            list[float](),
        )

    def report(self, step: int, loss: float, extra: str = "") -> None:
        """Count a step; print every now and then."""
        self.losses.append(loss)
        elapsed = time.monotonic() - self.start
        left = elapsed / (step + 1) * (self.steps - step - 1)
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        log(
            f"{self.name} {step + 1}/{self.steps}  loss {mean:.4f}{extra}  "
            f"elapsed {elapsed / 60:.1f} min  left {left / 60:.1f} min"
        )


def picture_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the language model gets to see: one vector for every patch."""
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    chosen = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    features: torch.Tensor = model.model.multi_modal_projector(chosen)
    return features


def learn_to_see(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    device: torch.device,
    steps: int,
) -> None:
    """Teach every patch's vector which of the nine cells it belongs to, and what is in there.

    The language model has to find things by place; without the cell among the lessons, the place
    would get lost on the way to it.
    """
    sizes = [*(len(values) + 1 for values in PROPERTIES.values()), 9]
    head = nn.Linear(model.config.text_config.hidden_size, sum(sizes)).to(device)
    side = torch.arange(PATCHES) * 3 // PATCHES
    cell_of_patch = (side[:, None] * 3 + side[None, :]).flatten().to(device)
    seeing = [model.model.vision_tower, model.model.multi_modal_projector]
    optimizer = Optimizer([*seeing, head], steps)
    progress = Progress("pictures", steps)
    batches = DataLoader(PictureBatches(steps, PICTURES, processor), batch_size=None, num_workers=1)
    # Steps this small gain nothing from a second thread, which the drawing of pictures needs.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step, (raw, classes) in enumerate(batches):
        with autocast(device):
            logits = head(picture_features(model, normalized(raw.to(device), processor)))
        target = classes.to(device)[:, cell_of_patch]
        cells = cell_of_patch.expand(target.shape[:2])
        target = torch.cat([target, cells[:, :, None]], dim=-1)
        parts = logits.float().split(sizes, dim=-1)
        losses = [
            cross_entropy(part.flatten(0, 1), target[:, :, column].flatten())
            for column, part in enumerate(parts)
        ]
        optimizer.step(torch.stack(losses).sum())
        if step % REPORT_EVERY == REPORT_EVERY - 1 or step == steps - 1:
            # Of the patches in cells that hold a shape, the share with every property right.
            held = target[:, :, 0] > 0
            right = torch.stack([part.argmax(-1) for part in parts], -1) == target
            accuracy = right.all(-1)[held].float().mean().item()
            progress.report(
                step, torch.stack(losses).sum().item(), f"  patches right {accuracy:.1%}"
            )
    torch.set_num_threads(threads)


def answer_logits(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    batch: Batch,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and true tokens, at the places of answer tokens only."""
    tokens, turn = batch.tokens.to(device), batch.turn.to(device)
    with autocast(device):
        # No attention mask: with padding on the right, no real token ever looks at it.
        hidden = model.model(
            input_ids=tokens,
            pixel_values=normalized(batch.pixels.to(device), processor),
            use_cache=False,
        ).last_hidden_state
        answers = turn[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][answers])
    return logits.float(), tokens[:, 1:][answers]


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    batch: Batch,
    device: torch.device,
) -> float:
    """Share of held-out answers with every token right, given the right history."""
    logits, truth = answer_logits(model, processor, batch, device)
    right = (logits.argmax(-1) == truth).cpu()
    turn = batch.turn[:, 1:]
    row = torch.arange(len(turn))[:, None].expand_as(turn)[turn > 0]
    answer = row * 1000 + turn[turn > 0]
    wrong = answer[~right].unique()
    return 1 - len(wrong) / len(answer.unique())


def learn_to_answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    device: torch.device,
    purpose: str,
    steps: int,
    output: Path,
) -> None:
    """Teach the language model the answers of the generated conversations."""
    # As in LLaVA-1.5, the vision tower stays as it is. So does the projector, which has learned
    # with it: the first gradients, which are still random, would only ruin what both know.
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    speaking = [model.model.language_model, model.lm_head]
    optimizer = Optimizer(speaking, steps, rate=1.0 if purpose == TRAINING else 0.5)
    held_out = make_batch(VALIDATION, 0, 96, TOKENS, processor, PATCHES**2)
    data = ConversationBatches(purpose, steps, CONVERSATIONS, TOKENS, processor, PATCHES**2)
    progress = Progress(purpose, steps)
    for step, batch in enumerate(
        DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4)
    ):
        logits, truth = answer_logits(model, processor, batch, device)
        loss = cross_entropy(logits, truth)
        optimizer.step(loss)
        if step % REPORT_EVERY == REPORT_EVERY - 1 or step == steps - 1:
            right = validate(model, processor, held_out, device)
            progress.report(step, loss.item(), f"  held-out answers right {right:.1%}")
        if step % SAVE_EVERY == SAVE_EVERY - 1 or step == steps - 1:
            write_llava_checkpoint(model, output, torch.float16)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "checkpoint",
        help="where to write the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to see that everything works"
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    keep_memory()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = build_processor()
    model = build_model(processor.tokenizer).to(device)
    # With pictures of 36 tokens, plain matrix products beat the fused kernels on a CPU.
    model.set_attn_implementation("eager")
    write_processor(processor, arguments.output)
    count = sum(parameter.numel() for parameter in model.parameters())
    log(f"{count:,} parameters, {len(processor.tokenizer)} tokens, on {device.type}")
    start = time.monotonic()
    quick = 10 if arguments.quick else None
    learn_to_see(model, processor, device, quick or PICTURE_STEPS)
    for purpose, steps in ((TRAINING, ANSWER_STEPS), (COUNTING, COUNTING_STEPS)):
        learn_to_answer(model, processor, device, purpose, quick or steps, arguments.output)
    log(f"wrote {arguments.output} after {(time.monotonic() - start) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
