"""A stage of `make gpu-check`: whole steps of a 7B text model whose weights are made on the device.

It needs no checkpoint: the model is the one that is served, with the graphs that it has, and with
random numbers in it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

from benchmarks.gpu_check.kernel_times import kernel_table, kernel_times
from benchmarks.gpu_check.prepare import geometry_of
from benchmarks.gpu_check.rows import limits_of
from benchmarks.gpu_check.stage import Options, run_stage
from benchmarks.limits import decode_step_bytes, prefill_flops
from llava_triton.checkpoint.loader import Checkpoint
from llava_triton.checkpoint.weights import CheckpointWeights, canonical_name
from llava_triton.contract.settings import Settings
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.runner import ModelRunner
from llava_triton.model.step import LaunchedStep, Step, StepPart, token_after

STEPS = 60
"""That are measured; the first ones warm up."""
WARM_UP = 10
PROFILED_STEPS = 5
IMAGE_TOKEN = 5


class RandomWeights(CheckpointWeights):
    """As many numbers as a checkpoint has, made where they are used.

    Args:
        shapes: by any release's names.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = {canonical_name(name): shape for name, shape in shapes.items()}

    def __contains__(self, name: str) -> bool:
        return canonical_name(name) in self._shapes

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `CheckpointWeights`."""
        return self._shapes.get(canonical_name(name))

    def is_packed(self, module: str) -> bool:
        """Never: they are made as floats."""
        return False

    def read_into(self, name: str, target: Tensor) -> None:
        """Standard deviation 1 / sqrt(inputs); norms are 1."""
        if target.dim() == 1:
            target.fill_(1.0 if "norm" in name else 0.0)
        else:
            target.normal_(std=target.shape[1] ** -0.5)


def synthetic_checkpoint(options: Options) -> Checkpoint:
    """Of the stage's geometry, in the type and on the device of the stage."""
    place = options.place
    geometry = geometry_of(options.geometry, cpu=place.device.type == "cpu")
    text = {"vocab_size": 64} | geometry.text
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**geometry.vision),
        text_config=geometry.family(**text),
        image_token_index=IMAGE_TOKEN,
    )
    with torch.device("meta"):
        skeleton: Any = AutoModelForImageTextToText.from_config(config).eval()
    weights = RandomWeights({n: tuple(each.shape) for n, each in skeleton.state_dict().items()})
    tokenizer = SimpleNamespace(eos_token_id=None)
    return Checkpoint(skeleton, weights, tokenizer, place.dtype, place.device)


class WholeSteps:
    """The parts of the stage.

    Args:
        options: of the stage.
    """

    def __init__(self, options: Options) -> None:
        self._options, self._sizes = options, options.place.sizes
        self._limits = limits_of(options)  # before the model takes the memory
        checkpoint = synthetic_checkpoint(options)
        self._config = checkpoint.skeleton.config.get_text_config()
        began = time.perf_counter()
        settings = Settings(dtype=options.place.dtype_name, max_sessions=self._sizes.many_sessions)
        self.runner = ModelRunner(checkpoint, settings)
        seconds = time.perf_counter() - began
        told = f"the model is ready after {seconds:.1f} s, with graphs: "
        told += str(self.runner.has_decode_graphs)
        options.findings.add("ready_seconds", seconds, told)
        if options.place.device.type == "cuda" and not self.runner.has_decode_graphs:
            options.findings.fault("decode steps could not be recorded; see the warning above")
        # A session's blocks: enough for what is measured.
        self._per_session = -(-(self._sizes.context_tokens + 2 * STEPS) // BLOCK_TOKENS)

    def decode_one(self) -> None:
        """One session."""
        self._decode("one", 1)

    def decode_many(self) -> None:
        """Many at once."""
        self._decode("many", self._sizes.many_sessions)

    def question(self) -> None:
        """A later turn's tokens, behind a conversation."""
        sizes = self._sizes
        part = StepPart([7] * sizes.question_tokens, sizes.context_tokens, self._blocks(0))
        took = [self._run([part]) for _ in range(sizes.repeats)]
        self._add("question_ms", statistics.median(took) * 1000, "a question's tokens")

    def prefill(self) -> None:
        """As many tokens as a picture and a text have."""
        sizes = self._sizes
        tokens = min(sizes.context_tokens, 576 + sizes.opening_text_tokens)
        tokens = min(tokens, self.runner.prefill_chunk_tokens)
        part = StepPart([7] * tokens, 0, self._blocks(0))
        seconds = statistics.median([self._run([part]) for _ in range(sizes.repeats)])
        self._add("prefill_ms", seconds * 1000, f"a prompt of {tokens} tokens")
        rate = prefill_flops(self._config, tokens, 0) / seconds
        share = rate / self._limits.matrix_flops_per_second
        told = f"  {100 * share:.1f} % of the matrix rate"
        self._options.findings.add("prefill_share", share, told)
        self._profile("prefill", [[part]] * PROFILED_STEPS)

    def _decode(self, name: str, sessions: int) -> None:
        """Steps that follow each other without waiting, as the engine launches them."""
        context = self._sizes.context_tokens
        steps = [
            [
                StepPart([token_after(row) if step else 7], context + step, self._blocks(row))
                for row in range(sessions)
            ]
            for step in range(STEPS)
        ]
        in_flight: list[LaunchedStep] = []
        device_seconds = []
        began = 0.0
        for number, parts in enumerate(steps):
            if number == WARM_UP:
                began = time.perf_counter()
            in_flight.append(self.runner.launch(Step(parts)))
            if len(in_flight) == self.runner.steps_at_once:
                device_seconds.append(in_flight.pop(0).wait().seconds)
        for launched in in_flight:
            device_seconds.append(launched.wait().seconds)
        seconds = (time.perf_counter() - began) / (STEPS - WARM_UP)
        device_ms = statistics.median(device_seconds[WARM_UP:]) * 1000
        self._add(f"decode_{name}_ms", seconds * 1000, f"a step of {sessions} sessions")
        self._add(f"decode_{name}_device_ms", device_ms, "  the device's own time")
        itemsize = self._options.place.dtype.itemsize
        contexts = [context + STEPS / 2] * sessions
        read = decode_step_bytes(
            self._config, contexts, bytes_per_weight=itemsize, bytes_per_value=itemsize
        )
        limit = read / self._limits.memory_bytes_per_second
        self._add(f"decode_{name}_limit_ms", limit * 1000, "  the memory's limit")
        share = limit / seconds
        told = f"  {100 * share:.1f} % of the limit"
        self._options.findings.add(f"decode_{name}_share", share, told)
        self._profile(f"decode_{name}", [steps[0]] * PROFILED_STEPS)

    def _profile(self, name: str, steps: Sequence[Sequence[StepPart]]) -> None:
        times = kernel_times(
            lambda: [self._run(parts) for parts in steps], self._options.place.device
        )
        told = f"time by kernel, of a step:\n{kernel_table(times, len(steps))}"
        self._options.findings.add(f"{name}_kernels", times, told)

    def _run(self, parts: Sequence[StepPart]) -> float:
        return self.runner.launch(Step(parts)).wait().seconds

    def _blocks(self, session: int) -> list[int]:
        return list(range(session * self._per_session, (session + 1) * self._per_session))

    def _add(self, name: str, milliseconds: float, what: str) -> None:
        self._options.findings.add(name, milliseconds, f"{what}: {milliseconds:.3f} ms")


def measure(options: Options) -> None:
    """The stage."""
    steps = WholeSteps(options)
    for part in (steps.decode_one, steps.decode_many, steps.question, steps.prefill):
        options.findings.attempt(part.__name__, part)


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
