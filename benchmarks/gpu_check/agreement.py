"""A stage of `make gpu-check`: greedy answers beside transformers' `generate` on the same device.

Two computations in a half type round differently, and where the two likeliest tokens are nearly
equally likely they may choose differently. So a difference is looked at: by how much transformers
itself preferred its token, and how far its logits are off those it computes in float32.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import answers
from benchmarks.engine_way import EngineWay
from benchmarks.export import DEMO
from benchmarks.findings import ROOT
from benchmarks.gpu_check.pythons import NO_GPU
from benchmarks.gpu_check.stage import Options, Place, repository_folder, run_stage
from benchmarks.load import Ask
from benchmarks.pictures import encoded
from benchmarks.references import Transformers
from benchmarks.workload import Workload
from demo.conversations import random_conversation
from demo.data import EVALUATION, picture, stream
from llava_triton.contract.settings import Settings

KV_BYTES = 4 << 30
"""Beside the engine, transformers' model needs room, too."""
ROUNDINGS = 2.0
"""Two logits may each be off by as much as any logit is."""
WORSE_SHARE = 0.01
"""Of the questions; more answers lost than that are no rounding."""
SESSION = "agreement"


@dataclass(frozen=True)
class Question:
    """One turn."""

    text: str
    pictures: Sequence[bytes] = ()


@dataclass(frozen=True)
class Difference:
    """Where an answer left transformers'."""

    text: str
    """The question."""
    position: int
    """In the answer."""
    expected: int
    """transformers' token."""
    got: int
    gap: float
    """transformers' logit of its own token less that of ours."""
    gap_roundings: float
    """The same in steps of the dtype at that logit."""
    true_gap: float
    """In float32: the likeliest token's logit less that of ours."""
    noise: float
    """How far transformers' logits are off those in float32, at the most."""

    @property
    def explained(self) -> bool:
        """Whether rounding explains it."""
        return self.true_gap <= ROUNDINGS * self.noise


@dataclass
class Agreement:
    """Of all answers compared."""

    answers: int = 0
    tokens: int = 0
    """Compared: up to the first difference of each answer."""
    differences: list[Difference] = field(default_factory=list)

    @property
    def unexplained(self) -> int:
        """Differences that are larger than rounding makes them."""
        return sum(not each.explained for each in self.differences)


def compare(
    reference: Transformers,
    way: EngineWay,
    conversation: Sequence[Question],
    tokens: int,
    agreement: Agreement,
) -> None:
    """Hold a conversation with the engine; transformers answers each turn of the same token IDs."""
    pictures: list[bytes] = []
    for index, question in enumerate(conversation):
        pictures += question.pictures
        ask = Ask(
            SESSION,
            start=index == 0,
            text=question.text,
            images=question.pictures,
            sampling={"max_tokens": tokens},
        )
        answer = way.ask(ask).wait()
        session = way.engine.inspect(lambda state: state.sessions.get(SESSION)).result()
        history = session.tokens[: session.committed]
        length = answer.done.num_input_tokens
        got = history[length:]
        expected, logits = reference.answer(history[:length], pictures, tokens)
        if answer.done.finish_reason == "stop":  # said, but no part of the conversation
            got.append(reference.model.generation_config.eos_token_id)
        agreement.answers += 1
        position = _first_difference(expected, got)
        agreement.tokens += len(expected) if position is None else position + 1
        if position is None:
            continue
        exact = reference.exact_logits([*history[:length], *expected[:position]], pictures)
        agreement.differences.append(
            _difference(
                question.text,
                position,
                (expected[position], got[position]),
                logits[position],
                exact,
                reference.model.dtype,
            )
        )
    way.ask(Ask(SESSION, end=True)).wait()


def _first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    for index, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return index
    if len(expected) != len(got):  # an end is a token, too
        raise RuntimeError(f"one answer goes on behind the other's end: {expected}, {got}")
    return None


def _difference(
    text: str,
    position: int,
    tokens: tuple[int, int],
    logits: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
) -> Difference:
    expected, got = tokens
    gap = float(logits[expected] - logits[got])
    _, exponent = math.frexp(float(logits[expected]))
    rounding = torch.finfo(dtype).eps * 2.0 ** (exponent - 1)
    return Difference(
        text,
        position,
        expected,
        got,
        gap,
        gap / rounding,
        float(exact.max() - exact[got]),
        float((logits - exact).abs().max()),
    )


def demo_conversations() -> Iterator[list[Question]]:
    """Those of the evaluation, about pictures that the demo checkpoint has never seen."""
    number = 0
    while True:
        rng = stream(EVALUATION, number)
        conversation = random_conversation(rng, turns=4)
        pictures = iter([encoded(picture(scene, rng), "PNG") for scene in conversation.scenes])
        yield [
            Question(turn.question, [next(pictures)] if turn.picture else [])
            for turn in conversation.turns
        ]
        number += 1


def random_conversations(workload: Workload) -> Iterator[list[Question]]:
    """Words and pictures of a benchmark."""
    number = 0
    while True:
        opening = Question(workload.question(0, number, 0), [workload.picture(10_003, number)])
        yield [opening, Question(workload.question(0, number, 1))]
        number += 1


def agree(
    checkpoint: Path, place: Place, conversations: Iterator[list[Question]], turns: int, tokens: int
) -> Agreement:
    """Hold conversations until so many turns were answered."""
    reference = Transformers(checkpoint, place.device, place.dtype)
    settings = Settings(
        dtype=place.dtype_name,
        max_sessions=2,
        kv_cache_bytes=KV_BYTES if place.device.type == "cuda" else None,
    )
    way = EngineWay(checkpoint, settings, reference.features, device=place.device)
    agreement = Agreement()
    try:
        while agreement.answers < turns:
            compare(reference, way, next(conversations), tokens, agreement)
    finally:
        way.close()
    return agreement


def measure(options: Options) -> None:
    """The stage."""
    place, sizes, findings = options.place, options.place.sizes, options.findings
    demo = repository_folder(options.folder, "demo")
    scores = options.folder / "cpu-scores.json"
    on_cpu = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.accuracy", "--repository", str(demo)),
            *("--questions", str(sizes.scored_questions), "--output", str(scores)),
            *("--precisions", "float32", "--quick"),
        ],
        cwd=ROOT,
        env=os.environ | NO_GPU,
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, Agreement] = {}

    def part(name: str, checkpoint: Path, conversations: Iterator[list[Question]]) -> None:
        agreement = agree(
            checkpoint, place, conversations, sizes.compared_turns, sizes.compared_tokens
        )
        found[name] = agreement
        told = f"{name}: {agreement.answers} answers, {agreement.tokens} tokens compared, "
        told += (
            f"{len(agreement.differences)} answers differ, {agreement.unexplained} without cause"
        )
        values = asdict(agreement) | {"unexplained": agreement.unexplained}
        findings.add(f"agreement_{name}", values, told)
        total = sum(each.unexplained for each in found.values())
        findings.add("unexplained", total, f"{total} answers differ without cause so far")
        for each in agreement.differences:
            print(
                f"  at {each.position}: {each.expected} or {each.got}, {each.gap_roundings:.1f} "
                f"roundings apart; in float32 {each.true_gap:.4f}, noise {each.noise:.4f}"
                f"{'' if each.explained else '  UNEXPLAINED'}"
            )
        if agreement.unexplained:
            findings.fault(f"{name}: {agreement.unexplained} answers differ without cause")

    workload = Workload(str(options.checkpoint), "none", question_tokens=sizes.question_tokens)
    random = random_conversations(workload)
    findings.attempt("demo checkpoint", lambda: part("demo", DEMO, demo_conversations()))
    findings.attempt(options.geometry, lambda: part(options.geometry, options.checkpoint, random))
    findings.attempt("scores", lambda: _score(options, demo, on_cpu, scores))


def _score(options: Options, demo: Path, on_cpu: subprocess.Popen[bytes], scores: Path) -> None:
    asked = answers(demo, options.place.dtype_name, options.place.sizes.scored_questions)
    correct = sum(one.correct for one in asked)
    if on_cpu.wait() != 0:
        raise RuntimeError("the evaluation on the CPU failed")
    expected = json.loads(scores.read_text())["precisions"]["float32"]["correct"]
    told = f"demo checkpoint: {correct} of {len(asked)} correct, {expected} on the CPU in float32"
    values = {"questions": len(asked), "correct": correct, "correct_on_cpu": expected}
    options.findings.add("scores", values, told)
    fewer = expected - correct
    options.findings.add("fewer", max(0, fewer), f"  {max(0, fewer)} fewer")
    if fewer > WORSE_SHARE * len(asked):
        options.findings.fault(f"{fewer} answers fewer are correct than on the CPU")


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
