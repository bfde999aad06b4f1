"""A later turn's first token, against what was said before it and against the sessions that are
open: with our engine in a process of its own."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.engine_way import EngineWay
from benchmarks.findings import table
from benchmarks.load import Answer, Ask, Way, exactly
from benchmarks.report import percentile_95
from benchmarks.workload import Workload

TURNS = 9
"""Of each session that is asked; the first is not counted."""
AT_ONCE = 500
"""Sessions opened at once: more turns than some are refused."""


@dataclass(frozen=True)
class Point:
    """What a later turn's first token took, in milliseconds."""

    context: int
    """Tokens of the conversation at the first of the turns."""
    idle_sessions: int
    """Open beside it."""
    first_token_ms: float
    """Median over turns."""
    first_token_95_ms: float
    """95th percentile."""


def measure_growth(way: Way, workload: Workload) -> list[Point]:
    """One session is asked at a time, by the engine's own clock.

    Args:
        way: an engine in this process, with room for all sessions.
        workload: how long conversations are, and how many sessions are open.
    """
    points = [_ask(way, workload, context, 0) for context in workload.contexts]
    opened = 0
    for idle in workload.idle_sessions:
        _open(way, range(opened, idle))
        opened = idle
        points.append(_ask(way, workload, workload.contexts[0], idle))
    return points


def _open(way: Way, numbers: Sequence[int]) -> None:
    """Sessions in which nothing was said yet."""
    for first in range(0, len(numbers), AT_ONCE):
        some = numbers[first : first + AT_ONCE]
        answers = [way.ask(Ask(f"idle {number}", start=True)) for number in some]
        for answer in answers:
            answer.wait()


def _ask(way: Way, workload: Workload, context: int, idle: int) -> Point:
    name = f"growth {context} {idle}"
    texts = [workload.text(context, name)]
    texts += [workload.text(workload.question_tokens, f"{name} {turn}") for turn in range(TURNS)]
    answers = [
        way.ask(
            Ask(name, start=turn == 0, end=turn == TURNS, text=text, sampling=exactly(2))
        ).wait()
        for turn, text in enumerate(texts)
    ]
    times = [_first_token_ms(answer) for answer in answers[2:]]
    before = answers[0].done
    return Point(
        before.num_input_tokens + before.num_output_tokens,
        idle,
        statistics.median(times),
        percentile_95(times),
    )


def _first_token_ms(answer: Answer) -> float:
    return (answer.engines_first_token_at - answer.asked_at) * 1000.0


def read_points(path: Path) -> list[Point]:
    """What the command wrote."""
    return [Point(**values) for values in json.loads(path.read_text())]


def by_what(points: Iterable[Point]) -> tuple[list[Point], list[Point]]:
    """Those of growing conversations, and those of more and more open sessions."""
    made = list(points)
    return (
        [point for point in made if not point.idle_sessions],
        [point for point in made if point.idle_sessions],
    )


def growth_text(growth: Mapping[str, Sequence[Point]]) -> str:
    """Tables for people: rows of ways, by their names."""
    texts = []
    titles = ("tokens said before", "open sessions beside it")
    for part, title in enumerate(titles):
        rows = [
            [way, *(f"{each.first_token_ms:.1f} / {each.first_token_95_ms:.1f}" for each in some)]
            for way, points in growth.items()
            if (some := by_what(points)[part])
        ]
        if rows:
            some = by_what(next(iter(growth.values())))[part]
            numbers = [each.idle_sessions if part else each.context for each in some]
            texts.append(table([title, *(f"{number:,}" for number in numbers)], rows))
    if not texts:
        return ""
    texts.append("A later turn's first token, ms, median / 95th, where one session is asked.\n")
    return "\n".join(texts)


def main() -> int:
    """Measure and write the points as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True, help="what `Workload.write` wrote")
    parser.add_argument("--output", type=Path, required=True, help="where to write the points")
    parser.add_argument("--weights", default="unrounded", help="the engine's `Settings.weights`")
    options = parser.parse_args()
    workload = Workload.read(options.workload)
    way = EngineWay.of_repository(
        Path(workload.repository),
        workload.dtype,
        weights=options.weights,
        max_sessions=max(workload.idle_sessions) + 1,
    )
    points = measure_growth(way, workload)
    options.output.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    way.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
