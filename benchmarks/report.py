"""The benchmark's table, its ratios, and whether they meet their targets."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from benchmarks.findings import Verdict, over_rounds, table, verdict_table
from benchmarks.load import Load

Rounds: TypeAlias = "list[dict[str, list[Load]]]"
"""What was measured, a round each: by the way's name, one load a number of sessions."""


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def percentile_95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % of all do not exceed; nan of none."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else float("nan")


def _first_tokens(load: Load, *, first_turn: bool) -> list[float]:
    return [turn.first_token_ms for turn in load.turns if (turn.turn == 0) == first_turn]


def _between_tokens(load: Load) -> list[float]:
    """Of each answer the mean."""
    return [turn.between_tokens_ms for turn in load.turns if turn.between_tokens_ms is not None]


METRICS: dict[str, Callable[[Load], float]] = {
    "first_token_first_turn_ms": lambda load: _median(_first_tokens(load, first_turn=True)),
    "first_token_later_turns_ms": lambda load: _median(_first_tokens(load, first_turn=False)),
    "between_tokens_ms": lambda load: _median(_between_tokens(load)),
    "tokens_per_second": lambda load: load.tokens_per_second,
    "peak_mib": lambda load: load.peak_mib,
    "around_engine_ms": lambda load: _median(
        [turn.around_engine_ms for turn in load.turns if turn.turn > 0]
    ),
    "mean_context": lambda load: statistics.mean(
        turn.prompt_tokens + turn.output_tokens / 2 for turn in load.turns
    ),
    "opening_tokens": lambda load: _median(
        [turn.prompt_tokens for turn in load.turns if turn.turn == 0]
    ),
    "first_token_first_turn_95_ms": lambda load: percentile_95(
        _first_tokens(load, first_turn=True)
    ),
    "first_token_later_turns_95_ms": lambda load: percentile_95(
        _first_tokens(load, first_turn=False)
    ),
    "between_tokens_95_ms": lambda load: percentile_95(_between_tokens(load)),
}
FIRST, LATER, BETWEEN, RATE, _MEMORY, AROUND, *_ = METRICS


@dataclass(frozen=True)
class Row:
    """One way under one load: medians over the rounds of each round's median, and of each round's
    95th percentile."""

    way: str
    title: str
    sessions: int
    rounds: int
    first_token_first_turn_ms: float
    first_token_later_turns_ms: float
    between_tokens_ms: float
    tokens_per_second: float
    peak_mib: float
    around_engine_ms: float
    mean_context: float
    """Tokens that a session attends to, over all its answers."""
    opening_tokens: float
    """Of the first turn's prompt, the picture's included."""
    first_token_first_turn_95_ms: float
    first_token_later_turns_95_ms: float
    between_tokens_95_ms: float
    """Over answers: of each its mean."""
    first_token_by_turn_ms: list[float]
    device_peak_mib: float | None
    """See `Load`; the highest of the rounds."""


@dataclass(frozen=True)
class Side:
    """A figure of one way under one load."""

    way: str
    sessions: int


@dataclass(frozen=True)
class Target:
    """What a figure, or its ratio to another one, should be."""

    text: str
    metric: str
    left: Side
    right: Side | None
    """None: the figure itself is judged."""
    bound: float
    at_most: bool = True

    def value(self, loads: Mapping[str, Sequence[Load]]) -> float | None:
        """In one round; None where a figure was not measured in it."""
        left = _figure(loads, self.left, self.metric)
        if self.right is None or left is None:
            return left
        right = _figure(loads, self.right, self.metric)
        return None if right is None else left / right


def _ours(way: str, bounds: tuple[float, float, float, float, float]) -> list[Target]:
    """The targets against a kept cache, for one precision."""
    later, between, rate, many, first = bounds
    one, sixteen, kept = Side(way, 1), Side(way, 16), Side("K", 1)
    return [
        Target(f"later first token, {way} / K", LATER, one, kept, later),
        Target(f"time between tokens, {way} / K", BETWEEN, one, kept, between),
        Target(f"tokens/s, {way} / K", RATE, one, kept, rate, at_most=False),
        Target(f"tokens/s at 16, {way} / K", RATE, sixteen, kept, many, at_most=False),
        Target(f"later first token, {way} at 16 / at 1", LATER, sixteen, one, 3.0),
        Target(f"first token of first turn, {way} / K", FIRST, one, kept, first),
    ]


def _server(served: str, engine: str) -> list[Target]:
    """What Triton may cost."""
    sixteen = Side(served, 16), Side(engine, 16)
    around = f"later first token of {served}, around engine, ms"
    return [
        Target(f"tokens/s at 16, {served} / {engine}", RATE, *sixteen, 0.9, at_most=False),
        # By two clocks within one run: two runs minutes apart differ by more than this.
        Target(around, AROUND, Side(served, 1), None, 3.0),
    ]


CPU_TARGETS = [
    *_ours("E", (0.7, 0.5, 2.0, 7.0, 0.8)),
    Target("later first token, E / S", LATER, Side("E", 1), Side("S", 1), 0.1),
    *_server("T", "E"),
    *_ours("E16", (0.6, 0.3, 3.0, 10.0, 0.5)),
    *_server("T16", "E16"),
    *_ours("E8", (0.6, 0.3, 3.0, 10.0, 0.5)),
    *_ours("E4", (0.6, 0.3, 3.0, 10.0, 0.5)),
    Target("time between tokens, E4 / E8", BETWEEN, Side("E4", 1), Side("E8", 1), 0.75),
]
GPU_TARGETS = _server("T", "E")
"""How far the engine is from the hardware's limits is shown, not judged."""
QUIET_SHARE = 0.05
"""Other programs may use this share of the machine; more spoils the figures, those of threads that
spin while they wait (transformers') most of all."""
UNLOADED_INTERVALS = 2.0
"""While a long prompt is computed, running streams may get a token this many usual intervals apart,
where that is more than the target."""


def _figure(loads: Mapping[str, Sequence[Load]], side: Side, metric: str) -> float | None:
    for load in loads.get(side.way, ()):
        if load.sessions == side.sessions:
            return METRICS[metric](load)
    return None


def rows(rounds: Rounds, titles: Mapping[str, str]) -> list[Row]:
    """One a way and load."""
    made = []
    for way, title in titles.items():
        counts = sorted({load.sessions for loads in rounds for load in loads.get(way, ())})
        for count in counts:
            same = [
                load for loads in rounds for load in loads.get(way, ()) if load.sessions == count
            ]
            values = {
                name: _median([metric(load) for load in same]) for name, metric in METRICS.items()
            }
            used = [load.device_peak_mib for load in same if load.device_peak_mib is not None]
            made.append(
                Row(
                    way,
                    title,
                    count,
                    len(same),
                    **values,
                    first_token_by_turn_ms=_first_token_by_turn(same),
                    device_peak_mib=max(used, default=None),
                )
            )
    return made


def _first_token_by_turn(loads: Sequence[Load]) -> list[float]:
    """Of every turn of the sessions, over several rounds of one load."""
    by_turn: dict[int, list[float]] = defaultdict(list)
    for load in loads:
        for turn in load.turns:
            by_turn[turn.turn].append(turn.first_token_ms)
    return [_median(by_turn[number]) for number in sorted(by_turn)]


def verdicts(
    rounds: Rounds,
    fairness: Mapping[str, Sequence[Mapping[str, Any]]],
    targets: Sequence[Target] = CPU_TARGETS,
) -> list[Verdict]:
    """Every target that can be judged by what was measured."""
    made = []
    for target in targets:
        values = [value for loads in rounds if (value := target.value(loads)) is not None]
        if values:
            made.append(over_rounds(target.text, values, target.bound, at_most=target.at_most))
    for way, measured in fairness.items():
        shares = [
            each["stalled_95_ms"] / max(each["target_ms"], UNLOADED_INTERVALS * each["usual_ms"])
            for each in measured
        ]
        text = f"interval of {way} beside a long prompt, 95th / allowed"
        made.append(over_rounds(text, shares, 1.0))
    return made


def equal_answers(rounds: Rounds) -> dict[str, str]:
    """By the way's name: how many answers of the one-session load are those of K (else of the first
    way), as "8 of 8", in the first round."""
    loads = {
        way: next((load for load in measured if load.sessions == 1), None)
        for way, measured in rounds[0].items()
    }
    reference = loads.get("K") or next((load for load in loads.values() if load), None)
    if reference is None:
        return {}
    expected = reference.texts(0)
    counts = {}
    for way, load in loads.items():
        if load is not None:
            same = sum(a == b for a, b in zip(expected, load.texts(0), strict=True))
            counts[way] = f"{same} of {len(expected)}"
    return counts


def report(
    rounds: Rounds,
    titles: Mapping[str, str],
    fairness: Mapping[str, Sequence[Mapping[str, Any]]],
    disturbances: Sequence[tuple[str, float]] = (),
    targets: Sequence[Target] = CPU_TARGETS,
) -> tuple[str, dict[str, Any]]:
    """The text for people, and all figures for programs.

    Args:
        rounds: what was measured.
        titles: the ways' titles, by their names.
        fairness: fields of `Fairness`, for each round, by the way's name.
        disturbances: every part's name, and the share of the machine that others used meanwhile.
        targets: to judge by.
    """
    measured, same = rows(rounds, titles), equal_answers(rounds)
    judged = verdicts(rounds, fairness, targets)
    parts = [_rows_table(measured), _notes(same), _fairness_text(fairness)]
    parts += [verdict_table(judged) if judged else "", _disturbance_text(disturbances)]
    values = {
        "rows": [asdict(row) for row in measured],
        "targets": [verdict.values() for verdict in judged],
        "fairness": dict(fairness),
        "equal_answers": same,
        "used_by_others": dict(disturbances),
        "rounds": [
            {
                way: [
                    {"sessions": load.sessions, "seconds": load.seconds}
                    | {name: metric(load) for name, metric in METRICS.items()}
                    for load in measured
                ]
                for way, measured in loads.items()
            }
            for loads in rounds
        ],
    }
    return "\n".join(part for part in parts if part), values


def _rows_table(rows: Sequence[Row]) -> str:
    heads = ["", "way", "sessions", "1st token, 1st turn, ms", "95th", "later turns, ms", "95th"]
    heads += ["between tokens, ms", "95th", "tokens/s", "peak memory, MiB"]
    on_gpu = any(row.device_peak_mib is not None for row in rows)
    cells = [
        [
            *(row.way, row.title, str(row.sessions)),
            f"{row.first_token_first_turn_ms:.1f}",
            f"{row.first_token_first_turn_95_ms:.1f}",
            f"{row.first_token_later_turns_ms:.1f}",
            f"{row.first_token_later_turns_95_ms:.1f}",
            f"{row.between_tokens_ms:.2f}",
            f"{row.between_tokens_95_ms:.2f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.peak_mib:.0f}",
            *([f"{row.device_peak_mib or float('nan'):.0f}"] if on_gpu else []),
        ]
        for row in rows
    ]
    return table(heads + (["GPU, MiB"] if on_gpu else []), cells)


def _notes(same: Mapping[str, str]) -> str:
    answers = ", ".join(f"{way} {count}" for way, count in same.items())
    return f"""\
Medians and 95th percentiles over turns; of each, the median over the rounds. All ways get the same
pictures (encoded) and questions. S and K answer one turn at a time, so their tokens per second hold
for any number of sessions; a session's time to its first token would then be the queue's. First
token: E by the engine's clock, the time in the encoder added; T by the client's clock, at the first
piece that it gets. Memory: all processes that answer, at their highest from their start on, shared
pages counted in each; on a GPU also all of its memory that is in use at the end. One-session
answers that are the same as K's: {answers}.
"""


def _fairness_text(fairness: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    texts = []
    for way, rounds in fairness.items():
        usual, usual_largest, stalled, stalled_95, stalled_largest, first_token = (
            _median([each[name] for each in rounds])
            for name in (
                *("usual_ms", "usual_largest_ms", "stalled_median_ms", "stalled_95_ms"),
                *("stalled_largest_ms", "prompt_first_token_ms"),
            )
        )
        texts.append(
            f"{way}: {rounds[0]['streams']} answers stream when a prompt of "
            f"{rounds[0]['prompt_tokens']:,} tokens comes.\n"
            f"  Time between pieces: usually {usual:.1f} ms (largest {usual_largest:.1f}); until "
            f"its first token, after {first_token:.0f} ms, {stalled:.1f} ms "
            f"(95th {stalled_95:.1f}, largest {stalled_largest:.1f}).\n"
        )
    return "\n".join(texts)


def _disturbance_text(disturbances: Sequence[tuple[str, float]]) -> str:
    loud = [
        f"{100 * share:.0f} % during {part}" for part, share in disturbances if share > QUIET_SHARE
    ]
    if not loud:
        return ""
    return (
        "WARNING: the machine was not quiet, so these figures prove nothing. Other programs used "
        f"{', '.join(loud)}.\n"
    )
