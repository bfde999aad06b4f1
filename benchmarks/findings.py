"""What every command leaves: one JSON file of one shape, the same as text, and one kind of table.

The file says under `about` when, where and with what it was measured; under `targets`, where there
are any, what was to be reached and whether it was; the rest are the command's own figures.
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
"""Where results go; those worth keeping are copied to `benchmarks/results/` and committed."""


def commit() -> str | None:
    """Of the checkout, where git knows it; with "-dirty" where files differ from it."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def about() -> dict[str, Any]:
    """Date, device, commit and versions."""
    # Not at the top: `benchmarks.gpu_check` runs where torch may be missing, and says so.
    import torch
    import transformers

    from benchmarks.limits import device_name
    from llava_triton.device import default_device

    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(default_device()),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def about_text(about: Mapping[str, Any]) -> str:
    """The same as a line for people."""
    geometry = f"geometry {about['geometry']}; " if "geometry" in about else ""
    return (
        f"{about['device']}, {about['date']}, commit {(about['commit'] or 'unknown')[:12]}; "
        f"{geometry}torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; those of numbers are aligned on the right."""
    cells = [list(row) for row in rows]
    columns = list(zip(heads, *cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [bool(cells) and all(map(_is_number, column[1:])) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if on_right else cell.ljust(width)
            for cell, width, on_right in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width for width in widths]
    rule = [dashes[1:] + ":" if each else dashes for dashes, each in zip(rule, right, strict=True)]
    return "\n".join([line(heads), line(rule), *map(line, cells)]) + "\n"


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell.lstrip("+-<>=").strip()[:1].isdigit() or cell == "nan"


@dataclass(frozen=True)
class Verdict:
    """A figure beside what it should be."""

    text: str
    value: float | None
    """None: it was not measured."""
    bound: float | None = None
    """None: no target, only measured."""
    at_most: bool = True
    unit: str = ""
    least: float | None = None
    """Of several rounds, whose median is the value."""
    most: float | None = None
    why: str = ""
    """It was not measured."""
    judged: bool = True
    """Else this run proves nothing."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is nothing to judge."""
        if self.value is None or self.bound is None or not self.judged:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def verdict(self) -> str:
        """In words."""
        if self.value is None:
            return "not measured"
        return {None: "measured", True: "met", False: "NOT MET"}[self.met]

    def values(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"met": self.met, "verdict": self.verdict}


def over_rounds(
    text: str, values: Sequence[float], bound: float, *, at_most: bool = True
) -> Verdict:
    """By the median of several rounds' figures."""
    value = statistics.median(values)
    return Verdict(text, value, bound, at_most, least=min(values), most=max(values))


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """For people."""
    judged = list(verdicts)
    in_rounds = any(each.least is not None for each in judged)
    rows = []
    for each in judged:
        value = "-" if each.value is None else f"{each.value:,.4g} {each.unit}".strip()
        rounds = "" if each.least is None else f"{each.least:,.4g} to {each.most:,.4g}"
        sign = "<=" if each.at_most else ">="
        target = "" if each.bound is None else f"{sign} {each.bound:g} {each.unit}".strip()
        why = f" ({first_line(each.why)})" if each.why else ""
        rows.append(
            [each.text, value, *([rounds] if in_rounds else []), target, f"{each.verdict}{why}"]
        )
    return table(["", "measured", *(["rounds"] if in_rounds else []), "target", ""], rows)


def first_line(text: str) -> str:
    """As much of a text as a table has room for."""
    line = text.partition("\n")[0]
    return line if len(line) <= 160 else f"{line[:157]}..."


def save(output: Path, text: str, values: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a result in both forms.

    Args:
        output: of the JSON; the text goes beside it.
        text: for people.
        values: every figure.
        about: see `about`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"about": about, **values}, indent=1) + "\n")
    output.with_suffix(".txt").write_text(text)


def write_results(
    output: Path, text: str, values: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Print a result below what it is about, write it as `save` does, and say where."""
    told = f"{about_text(about)}\n{text.rstrip()}\n"
    save(output, told, values, about)
    print(f"\n{told}\nwritten to {output} and {output.with_suffix('.txt').name}", flush=True)
