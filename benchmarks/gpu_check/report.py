"""The report of `make gpu-check`: stages, targets and figures, for people and for programs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.findings import Verdict, first_line, save, table, verdict_table

FILE_NAME = "gpu-check-{step}.json"
CPU_WARNING = """\
THIS WAS A RUN WITHOUT A GPU, of a tiny model on a CPU. It tests the command; its figures say
nothing about any GPU, and its targets were not judged.
"""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and what it found."""

    name: str
    title: str
    result: str
    """passed, failed, cut off, or not run."""
    seconds: float
    why: str = ""
    """Where it has not passed."""
    values: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[str] = ()
    output_end: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """A figure, and what it should be."""

    text: str
    stage: str
    finding: str
    unit: str = ""
    bound: float | None = None
    """None: no target, only measured."""
    at_most: bool = True
    scale: float = 1.0
    """From the finding's unit to the row's."""


def _share(text: str, stage: str, finding: str, bound: float | None = None) -> Row:
    return Row(text, stage, finding, "%", bound, at_most=False, scale=100.0)


ROWS = (
    Row("answer tokens that differ without cause", "agreement", "unexplained", "", 0),
    Row("demo checkpoint: correct answers fewer than on the CPU", "agreement", "fewer", "", 0),
    Row("an empty node of a CUDA graph", "kernels", "node_plain_us", "us"),
    Row("  with dependent launch", "kernels", "node_dependent_us", "us"),
    _share("decode, 1 session, of the limit, synthetic", "step", "decode_one_share", 85),
    Row("  a step", "step", "decode_one_ms", "ms"),
    _share("decode, many sessions, of the limit, synthetic", "step", "decode_many_share", 75),
    Row("  a step", "step", "decode_many_ms", "ms"),
    Row("a question's tokens, synthetic", "step", "question_ms", "ms"),
    _share("prefill, of the matrix rate, synthetic", "step", "prefill_share", 50),
    _share("decode, 1 session, of the limit, through Triton", "triton", "decode_one_share", 85),
    _share("  the engine alone", "rows", "decode_one_share"),
    _share("decode, many sessions, of the limit, engine alone", "rows", "decode_many_share", 75),
    _share("  through Triton, of the engine's tokens/s", "triton", "many_of_engine", 90),
    Row("later turn, first token less 2 steps, Triton", "triton", "later_excess_ms", "ms", 3),
    Row("  the engine alone", "rows", "later_excess_ms", "ms"),
    Row("opening on a 336-px picture, Triton", "triton", "opening_small_ms", "ms", 40),
    Row("  encoder and engine alone", "openings", "opening_small_ms", "ms"),
    Row("opening on a large JPEG (12 megapixels), Triton", "triton", "opening_large_ms", "ms", 90),
    Row("  encoder and engine alone", "openings", "opening_large_ms", "ms"),
    _share("prefill of a picture and a text, of the matrix rate", "rows", "prefill_share", 50),
    Row("brought back from the host / the copy's own time", "memory", "over_copy", "x", 1.3),
    Row("  the same / computing it again", "memory", "over_computing", "x", 1.0),
    Row("answers changed by leaving and coming back", "memory", "changed_answers", "", 0),
    Row("  by being computed again (rounding)", "memory", "changed_by_computing", ""),
    Row(
        "open sessions with their features that fit",
        "open",
        "sessions_that_fit",
        "",
        5000,
        at_most=False,
    ),
    Row("  really opened", "open", "sessions_opened", ""),
    Row("tests of kernels and graphs passed", "tests", "passed", ""),
    Row("tests of the engine passed", "engine-tests", "passed", ""),
    Row("transformers, stateless: first token of a later turn", "baselines", "S_later_ms", "ms"),
    Row("  between tokens", "baselines", "S_between_ms", "ms"),
    Row("transformers, kept cache: first token of a later turn", "baselines", "K_later_ms", "ms"),
    Row("  between tokens", "baselines", "K_between_ms", "ms"),
    Row("the engine: first token of a later turn", "rows", "later_ms", "ms"),
    Row("  between tokens", "rows", "decode_one_ms", "ms"),
    Row("8-bit weights: decode, 1 session, times as fast", "rows-int8", "decode_one_ms_gain", "x"),
    Row("  many sessions", "rows-int8", "decode_many_tokens_per_second_gain", "x"),
    _share("once more: decode, 1 session, of the limit", "rows-again", "decode_one_share"),
    _share("  many sessions", "rows-again", "decode_many_share"),
    _share("grouped-query: decode, 1 session, of the limit", "rows-mistral", "decode_one_share"),
    _share("  many sessions", "rows-mistral", "decode_many_share"),
    _share("  prefill, of the matrix rate", "rows-mistral", "prefill_share"),
    Row("  later turn, first token less 2 steps", "rows-mistral", "later_excess_ms", "ms"),
)


class Report:
    """Written anew with every outcome.

    Args:
        folder: for `FILE_NAME`, and the same as text.
        step: which of the three commands this is.
        facts: machine, versions, date, commit.
        cpu: whether this is a run without a GPU.
        stages: names of all there are, in their order.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        facts: Mapping[str, Any],
        *,
        cpu: bool,
        stages: Sequence[str],
    ) -> None:
        self.file = folder / FILE_NAME.format(step=step)
        self._facts = dict(facts)
        self._cpu = cpu
        self._stages = stages
        self._outcomes: dict[str, Outcome] = {}
        self._lock = threading.Lock()
        self._write()

    def add(self, outcome: Outcome) -> None:
        """Keep how a stage ended."""
        with self._lock:
            self._outcomes[outcome.name] = outcome
            self._write()

    @property
    def complete(self) -> bool:
        """Whether every stage there is has passed."""
        return self.passed(self._stages)

    def passed(self, stages: Iterable[str]) -> bool:
        """Whether these have."""
        found = self._outcomes
        return all(name in found and found[name].result == "passed" for name in stages)

    def text(self) -> str:
        """For people."""
        facts, versions = self._facts, self._facts["versions"]
        device = "no GPU" if self._cpu else f"{facts['device']}, {facts['memory_gib']} GiB"
        parts = [CPU_WARNING] if self._cpu else []
        parts.append(f"{device}; driver {facts['driver']}, CUDA {facts['cuda']}, ")
        parts[-1] += f"Python {facts['python']}\n"
        parts[-1] += ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        parts[-1] += f"\n{facts['date']}, commit {facts['commit'] or 'unknown'}\n"
        parts.append(verdict_table(self._judge(row) for row in self._rows()))
        stages = [
            (each.name, each.result, f"{each.seconds:.1f} s", first_line(each.why))
            for each in self._in_order()
        ]
        parts.append(table(("stage", "result", "took", "why"), stages))
        return "\n".join(parts)

    def rows(self) -> list[dict[str, Any]]:
        """Every row with its value and verdict."""
        return [asdict(row) | self._judge(row).values() for row in self._rows()]

    def _rows(self) -> list[Row]:
        """Those of this step's stages."""
        return [row for row in ROWS if row.stage in self._stages]

    def _judge(self, row: Row) -> Verdict:
        outcome = self._outcomes.get(row.stage)
        value, why = None, f"stage {row.stage} has not run"
        if outcome is not None:
            value = outcome.values.get(row.finding)
            why = outcome.left_out.get(row.finding) or outcome.why or "it was not found"
            why = f"{row.stage}: {why}" if value is None else ""
        return Verdict(
            row.text,
            None if value is None else value * row.scale,
            row.bound,
            row.at_most,
            row.unit,
            why=why,
            judged=not self._cpu,
        )

    def _in_order(self) -> list[Outcome]:
        return [self._outcomes[name] for name in self._stages if name in self._outcomes]

    def _write(self) -> None:
        values = {
            "run_without_a_gpu": self._cpu,
            "complete": self.complete,
            "rows": self.rows(),
            "stages": [asdict(outcome) for outcome in self._in_order()],
        }
        save(self.file, self.text(), values, self._facts)
