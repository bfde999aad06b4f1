"""The figures of our engine and its peers, the ratios to the best peer, and the replies that are
equal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.findings import Verdict, first_line, over_rounds, table
from benchmarks.load import Load
from benchmarks.report import BETWEEN, FIRST, LATER, METRICS, RATE, Rounds, rows

QUIET_CORES = 0.08
"""Other programs may keep so much of a processor busy; rows with more of it are marked."""

FLOAT32 = ("K", "E", "T", "V", "O")
"""All of them round alike, so their greedy replies should be equal."""
BFLOAT16 = ("E16", "T16", "V16")
"""They round in the same format, but not in the same places."""
PEERS_OF = {"E": ("K", "V", "O"), "E16": ("V16", "O16"), "E8": ("V16", "O16")}
"""The peers of the same class of precision, by our way."""
FIRST_95, LATER_95 = "first_token_first_turn_95_ms", "first_token_later_turns_95_ms"
UNKNOWN = ("around_engine_ms", "mean_context", "opening_tokens")
"""Figures of `Row` that not all peers tell."""


@dataclass(frozen=True)
class Bar:
    """What the ratio of a figure to another way's should be."""

    text: str
    metric: str
    sessions: int
    bounds: Mapping[str, float]
    """By our way."""
    at_most: bool = True
    served: bool = False
    """The other way is the engine without Triton; else the best peer."""


def _same(bound: float) -> dict[str, float]:
    return {"E16": bound, "E8": bound}


BARS = (
    Bar("first turn's first token", FIRST, 16, {"E": 0.7, **_same(0.9)}),
    Bar(
        "first turn's first token (95th)",
        "first_token_first_turn_95_ms",
        16,
        {"E": 0.9, **_same(0.9)},
    ),
    Bar("first turn's first token", FIRST, 4, {"E": 0.8, **_same(0.9)}),
    Bar("first turn's first token", FIRST, 1, {"E": 0.85, **_same(0.9)}),
    Bar("later turns' first token", LATER, 1, {"E": 0.45, **_same(0.45)}),
    Bar("later turns' first token", LATER, 4, {"E": 0.4, **_same(0.3)}),
    Bar("later turns' first token", LATER, 16, {"E": 0.4, **_same(0.35)}),
    Bar("time between tokens", BETWEEN, 1, {"E": 0.9, "E8": 0.5}),
    Bar("tokens per second", RATE, 16, {"E": 1.2, **_same(1.2)}, at_most=False),
    Bar("later turns' first token", LATER, 16, {"T": 1.2, "T16": 1.2}, served=True),
    Bar("tokens per second", RATE, 16, {"T": 0.95, "T16": 0.92}, at_most=False, served=True),
)
"""To reach on two cores."""


@dataclass(frozen=True)
class Comparison:
    """One of our figures beside the one that it is compared with, over all passes."""

    way: str
    sessions: int
    ours: float
    """Median."""
    best: float
    """Median of what it is compared with."""
    others: tuple[str, ...]
    """The ways that it was compared with: of each pass the best."""
    disturbed: bool
    """Other programs ran beside one of them."""
    verdict: Verdict


def _load(loads: Mapping[str, Sequence[Load]], way: str, sessions: int) -> Load | None:
    return next((load for load in loads.get(way, ()) if load.sessions == sessions), None)


def comparisons(rounds: Rounds, bars: Iterable[Bar] = BARS) -> list[Comparison]:
    """All that can be judged by what was measured."""
    made = []
    for bar in bars:
        for way, bound in bar.bounds.items():
            compared = _compare(rounds, bar, way, bound)
            if compared is not None:
                made.append(compared)
    return made


def _compare(rounds: Rounds, bar: Bar, way: str, bound: float) -> Comparison | None:
    against = (way.replace("T", "E"),) if bar.served else PEERS_OF[way]
    figure = METRICS[bar.metric]
    pairs: list[tuple[float, float]] = []
    others: list[str] = []
    disturbed = False
    for loads in rounds:
        ours = _load(loads, way, bar.sessions)
        found = {peer: _load(loads, peer, bar.sessions) for peer in against}
        figures = {peer: (figure(load), load) for peer, load in found.items() if load is not None}
        if ours is None or not figures:
            continue
        choose = min if bar.at_most else max
        best = choose(figures, key=lambda peer: figures[peer][0])
        value, load = figures[best]
        pairs.append((figure(ours), value))
        others.append(best)
        disturbed |= max(ours.others_cores, load.others_cores) > QUIET_CORES
    if not pairs:
        return None
    ratios = [ours / best for ours, best in pairs]
    text = f"{bar.text}, {bar.sessions} at once, {way} / {' or '.join(dict.fromkeys(others))}"
    return Comparison(
        way,
        bar.sessions,
        ours=statistics.median(ours for ours, _ in pairs),
        best=statistics.median(best for _, best in pairs),
        others=tuple(dict.fromkeys(others)),
        disturbed=disturbed,
        verdict=over_rounds(text, ratios, bound, at_most=bar.at_most),
    )


def equal_replies(rounds: Rounds) -> dict[str, tuple[int, int]]:
    """By the way's name: how many of its replies are, word for word, those of the first way of the
    same precision, and of how many. Where transformers did not hold as many sessions, the replies
    are compared with the next way's that did."""
    equal: dict[str, tuple[int, int]] = {}
    for ways in (FLOAT32, BFLOAT16):
        expected: dict[tuple[int, int, int], str] = {}
        for way in ways:
            said = [reply for loads in rounds for reply in _replies(loads.get(way, ()))]
            known = [(key, text) for key, text in said if key in expected]
            if known:
                same = sum(expected[key] == text for key, text in known)
                equal[way] = same, len(known)
            for key, text in said:
                expected.setdefault(key, text)
    return equal


def _replies(loads: Iterable[Load]) -> Iterable[tuple[tuple[int, int, int], str]]:
    for load in loads:
        for turn in load.turns:
            yield (load.sessions, turn.session, turn.turn), turn.text


def report(
    rounds: Rounds, titles: Mapping[str, str], failed: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """The text for people, and all figures for programs.

    Args:
        rounds: what was measured.
        titles: all ways' titles, by their names.
        failed: by the names of ways that could not be measured, why.
    """
    compared, equal = comparisons(rounds), equal_replies(rounds)
    loads = [
        (number, way, load)
        for number, measured in enumerate(rounds, 1)
        for way, some in measured.items()
        for load in some
    ]
    parts = [_figures_table(rounds, titles, failed), _notes(equal, failed)]
    if compared:
        parts += [_comparisons_table(compared), _MARKS]
    values = {
        "rows": [_known(asdict(row)) for row in rows(rounds, titles)],
        "targets": [
            each.verdict.values() | {"ours": each.ours, "best": each.best, "best_ways": each.others}
            for each in compared
        ],
        "equal_replies": equal,
        "failed": dict(failed),
        "passes": [
            {"pass": number, "way": way, "sessions": load.sessions, "seconds": load.seconds}
            | {"others_cores": load.others_cores}
            | _known({name: metric(load) for name, metric in METRICS.items()})
            for number, way, load in loads
        ],
    }
    return "\n".join(parts), values


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in UNKNOWN}


def _figures_table(rounds: Rounds, titles: Mapping[str, str], failed: Mapping[str, str]) -> str:
    heads = ["", "way", "sessions", "1st token, 1st turn, ms", "95th", "later turns, ms", "95th"]
    heads += ["between tokens, ms", "tokens/s", "others, cores"]
    cells = []
    for way, title in titles.items():
        measured = [load for loads in rounds for load in loads.get(way, ())]
        for count in sorted({load.sessions for load in measured}):
            some = [load for load in measured if load.sessions == count]
            others = max(load.others_cores for load in some)
            figures = [
                _span([METRICS[metric](load) for load in some], digits)
                for metric, digits in (
                    *((FIRST, 0), (FIRST_95, 0)),
                    *((LATER, 0), (LATER_95, 0)),
                    *((BETWEEN, 1), (RATE, 0)),
                )
            ]
            mark = " *" if others > QUIET_CORES else ""
            cells.append([way, title, str(count), *figures, f"{others:.2f}{mark}"])
        if way in failed:
            cells.append([way, f"{title}: {first_line(failed[way])}", *["-"] * 8])
    return table(heads, cells)


def _span(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return low if low == high else f"{low}-{high}"


def _notes(equal: Mapping[str, tuple[int, int]], failed: Mapping[str, str]) -> str:
    said = [
        f"{way} {same:,} of {count:,} ({100 * same / count:.0f} %)"
        for way, (same, count) in equal.items()
    ]
    lines = [
        "Medians and 95th percentiles over turns, of each the lowest and the highest pass. A",
        "question is due when the reply before it has ended; its first token counts from there.",
        "Others: processors that programs outside the measurement kept busy, in the worst pass.",
    ]
    if said:
        lines += ["Replies equal to the first way's of the same precision, word for word:"]
        lines += [f"{', '.join(said)}."]
    lines += [f"{way} was not measured: {why}" for way, why in failed.items()]
    return "\n".join(lines) + "\n"


_MARKS = f"""\
Ratios are taken within a pass, to the best peer of the same class of precision; the median of the
passes is judged. *: other programs kept more than {QUIET_CORES} of a processor busy meanwhile.
"""


def _comparisons_table(compared: Iterable[Comparison]) -> str:
    heads = ["", "ours", "best", "ratio", "passes", "to reach", "reached"]
    cells = []
    for each in compared:
        verdict = each.verdict
        sign = "<=" if verdict.at_most else ">="
        cells.append(
            [
                verdict.text,
                f"{each.ours:,.4g}",
                f"{each.best:,.4g}",
                f"{verdict.value:.2f}",
                f"{verdict.least:.2f}-{verdict.most:.2f}",
                f"{sign} {verdict.bound:g}",
                ("yes" if verdict.met else "no") + (" *" if each.disturbed else ""),
            ]
        )
    return table(heads, cells)
