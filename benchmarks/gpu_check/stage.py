"""What the stages of `make gpu-check` share: sizes, arguments, and where findings go."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SEVEN, MISTRAL = "llava-1.5-7b", "llava-1.6-mistral-7b"
"""The geometries; the second one's heads share keys and values."""
PARAMETERS = "gpu-parameters.json"
"""The kernels' parameters that step 1 chose, beside the findings and then beside the report."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    context_tokens: int
    """Of a session whose decode steps are measured, a picture's tokens included."""
    many_sessions: int
    """At once."""
    answer_tokens: int
    question_tokens: int
    """Of a later turn."""
    opening_text_tokens: int
    """Behind a picture, in the prefill that is measured."""
    repeats: int
    """Of what is measured one by one; medians count."""
    large_picture: tuple[int, int]
    """Width and height of the large JPEG."""
    compared_turns: int
    """Whose greedy answers are compared with transformers'."""
    compared_tokens: int
    """Of each answer."""
    scored_questions: int
    """Put to the demo checkpoint."""
    leak_sessions: int
    opened_sessions: int
    """Whose memory is measured."""
    wanted_sessions: int
    """That shall be open with their image features."""
    baseline_turns: int
    """Of transformers' sessions."""


ON_A_GPU = Sizes(
    context_tokens=1000,
    many_sessions=64,
    answer_tokens=128,
    question_tokens=32,
    opening_text_tokens=64,
    repeats=9,
    large_picture=(4000, 3000),
    compared_turns=24,
    compared_tokens=32,
    scored_questions=300,
    leak_sessions=2000,
    opened_sessions=200,
    wanted_sessions=5000,
    baseline_turns=4,
)
TINY = Sizes(
    context_tokens=300,
    many_sessions=4,
    answer_tokens=384,
    question_tokens=8,
    opening_text_tokens=8,
    repeats=2,
    large_picture=(400, 300),
    compared_turns=4,
    compared_tokens=12,
    scored_questions=12,
    leak_sessions=60,
    opened_sessions=6,
    wanted_sessions=12,
    baseline_turns=2,
)
"""For a run without a GPU: it tests the command, its figures say nothing."""


@dataclass(frozen=True)
class Place:
    """Where and in what a stage computes, and how much."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    @property
    def dtype_name(self) -> str:
        """As in `Settings.dtype`."""
        return str(self.dtype).removeprefix("torch.")

    @classmethod
    def of(cls, *, cpu: bool) -> Place:
        """The GPU in bfloat16, or the CPU in float32 with the tiny sizes."""
        if cpu:
            return cls(torch.device("cpu"), torch.float32, TINY)
        return cls(torch.device("cuda"), torch.bfloat16, ON_A_GPU)


class Findings:
    """What a stage has found so far. It is on disk at every moment: a stage may be cut off."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        """By name: why it was not measured."""
        self.faults: list[str] = []
        """What makes the stage fail, a sentence each."""

    def add(self, name: str, value: Any, told: str) -> None:
        """Keep one finding.

        Args:
            name: of the finding, as the report looks for it.
            value: anything that JSON can hold.
            told: a line for people.
        """
        self.values[name] = value
        print(told, flush=True)
        self._write()

    def leave_out(self, name: str, why: str) -> None:
        """Say that something was not measured."""
        self.left_out[name] = why
        print(f"{name}: not measured, {why}", flush=True)
        self._write()

    def fault(self, sentence: str) -> None:
        """Let the stage fail, but go on."""
        self.faults.append(sentence)
        print(f"FAULT: {sentence}", flush=True)
        self._write()

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Do a part of the stage; if it breaks, the others are done all the same."""
        began = time.perf_counter()
        try:
            measure()
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            self.fault(f"{what}: {type(error).__name__}: {error}")
        print(f"[{what}: {time.perf_counter() - began:.1f} s]", flush=True)

    def _write(self) -> None:
        # In one go: whoever reads it meanwhile finds the last state whole.
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(vars(self) | {"_file": None}, indent=1))
        new.replace(self._file)


def read_findings(file: Path) -> dict[str, Any]:
    """`values`, `left_out` and `faults` as a stage left them; of one that found nothing, empty."""
    if not file.is_file():
        return {"values": {}, "left_out": {}, "faults": []}
    found: dict[str, Any] = json.loads(file.read_text())
    del found["_file"]
    return found


@dataclass(frozen=True)
class Options:
    """A stage's command line."""

    place: Place
    folder: Path
    """Shared by all stages of a run: checkpoints and repositories."""
    geometry: str
    """Name of the model's geometry."""
    findings: Findings

    @property
    def checkpoint(self) -> Path:
        """Of the geometry, once the stage `prepare` has written it."""
        return checkpoint_folder(self.folder, self.geometry)


def checkpoint_folder(folder: Path, geometry: str) -> Path:
    """Where the checkpoint of a geometry lies."""
    return folder / "checkpoints" / geometry


def repository_folder(folder: Path, geometry: str) -> Path:
    """Where its model repository lies."""
    return folder / "repositories" / geometry


def run_stage(description: str, measure: Callable[[Options], None]) -> int:
    """A stage's `main`.

    Returns:
        Exit code: 0 where there was no fault.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, required=True, help="shared by all stages")
    parser.add_argument("--findings", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--geometry", default="", help="name of the model's geometry")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU")
    given = parser.parse_args()
    findings = Findings(given.findings)
    options = Options(Place.of(cpu=given.cpu), given.folder, given.geometry, findings)
    findings.attempt("the whole stage", lambda: measure(options))
    return 1 if findings.faults else 0
