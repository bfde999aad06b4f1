"""Draws what `make bench` and `make bench-peers` measured.

`python -m benchmarks.plots RESULTS.json` draws it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

NEEDS = ("about", "rows", "quick")
LOOKS = {
    "S": ("#000000", "s", ":"),
    "K": ("#E69F00", "D", "-."),
    "E": ("#0072B2", "o", "-"),
    "T": ("#D55E00", "^", "-"),
    "E16": ("#56B4E9", "o", "--"),
    "T16": ("#CC79A7", "^", "--"),
    "E8": ("#009E73", "v", "--"),
    "E4": ("#B8A900", "D", "--"),
    "V": ("#000000", "P", "-"),
    "V16": ("#000000", "P", "--"),
    "O": ("#B8A900", "X", "-"),
    "O16": ("#B8A900", "X", "--"),
}
"""Colour, marker and line of each way: Okabe and Ito's colours (the yellow darker), which
colour-blind people can tell apart, and shapes that need no colour. S and V are never in one
plot, nor are E4 and O."""
STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 3,
}
Rows = Sequence[dict[str, Any]]


def draw(results: Path) -> list[Path]:
    """Draw PNG files beside the results, which give them their names.

    Args:
        results: JSON that `make bench` or `make bench-peers` wrote.

    Returns:
        The files: first token, openings, throughput; limits and growth where the results have them.

    Raises:
        ValueError: the file is no such result, or one of an older release.
    """
    values = _read(results)
    about = values["about"]
    under = f"{about['device']}, geometry {about['geometry']}, {about['date']}"
    if values["quick"]:
        under += ", a quick run: the figures say nothing about speed"
    drawings: dict[str, Callable[[dict[str, Any]], Figure]] = {
        "first-token": _first_token,
        "openings": _openings,
        "throughput": _throughput,
    }
    if values.get("distances"):
        drawings["limits"] = _limits
    if values.get("growth"):
        drawings["growth"] = _growth
    files = []
    with mpl.rc_context(STYLE):
        for name, drawing in drawings.items():
            figure = drawing(values)
            figure.suptitle(f"{figure.get_suptitle()}\n{under}", fontsize=13)
            files.append(results.with_name(f"{results.stem}-{name}.png"))
            figure.savefig(files[-1], dpi=150)
    return files


def _read(results: Path) -> dict[str, Any]:
    try:
        values = json.loads(results.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{results} cannot be read as JSON: {error}") from error
    missing = [name for name in NEEDS if not isinstance(values, dict) or name not in values]
    if missing:
        raise ValueError(
            f"{results} has no {', '.join(missing)}: it was not written by this release's "
            "`make bench` or `make bench-peers`; run that again"
        )
    return dict(values)


def _figure(title: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Of 8 inches' width, so that its text can be read at 800 pixels."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0.05, 1, 0.95))  # below it goes a line about the run
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    figure.suptitle(title, fontsize=14)
    return figure, list(axes)


def _by_way(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["sessions"])):
        ways.setdefault(row["way"], []).append(row)
    return {way: ways[way] for way in LOOKS if way in ways}


def _line(axes: Axes, way: str, title: str, x: Sequence[float], y: Sequence[float]) -> None:
    colour, marker, line = LOOKS[way]
    axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=f"{way}  {title}")


def _numbers(value: float, _position: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _sessions_axis(axes: Axes, rows: Rows) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["sessions"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(_numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sessions at once")


def _first_token(values: dict[str, Any]) -> Figure:
    fewest = min(row["sessions"] for row in values["rows"])
    rows = [row for row in values["rows"] if row["sessions"] == fewest]
    of = "one session" if fewest == 1 else f"{fewest} sessions at once"
    figure, (axes,) = _figure(f"Time to each turn's first token, {of}")
    for way, (row,) in _by_way(rows).items():
        times = row["first_token_by_turn_ms"]
        _line(axes, way, row["title"], range(1, len(times) + 1), times)
    _milliseconds_axis(axes)
    axes.set_xticks(range(1, max(len(row["first_token_by_turn_ms"]) for row in rows) + 1))
    axes.set_xlabel("turn (the picture comes with the first)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _milliseconds_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Round numbers on an axis that is often shorter than a power of ten.
    ticks = [step * 10.0**power for power in range(-2, 6) for step in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(_numbers))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("milliseconds (logarithmic)")


def _openings(values: dict[str, Any]) -> Figure:
    figure, panels = _figure("Time to the first token where so many sessions ask at once", panels=2)
    metrics = {
        "first_token_first_turn_ms": "first turn, with the picture",
        "first_token_later_turns_ms": "later turns",
    }
    for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
        for way, rows in _by_way(values["rows"]).items():
            x, y = [row["sessions"] for row in rows], [row[metric] for row in rows]
            _line(axes, way, rows[0]["title"], x, y)
        axes.set_title(title, fontsize=12)
        _sessions_axis(axes, values["rows"])
    _milliseconds_axis(panels[0])
    panels[1].set_ylabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _throughput(values: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure("Answer tokens per second, all sessions together")
    for way, rows in _by_way(values["rows"]).items():
        rates = [row["tokens_per_second"] for row in rows]
        if way in "SK":  # one turn at a time: the rate is the same for any number of sessions
            colour, _, line = LOOKS[way]
            title = f"{way}  {rows[0]['title']} (one at a time)"
            axes.axhline(rates[0], color=colour, linestyle=line, label=title)
        else:
            _line(axes, way, rows[0]["title"], [row["sessions"] for row in rows], rates)
    _sessions_axis(axes, values["rows"])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _limits(values: dict[str, Any]) -> Figure:
    figure, panels = _figure("How near the hardware's limit: limit / measured time", panels=2)
    shares = {
        "decode_share": "between two tokens:\nweights, keys, values read once",
        "opening_share": "first token of the first turn:\nencoder's and prompt's products",
    }
    for axes, (share, title) in zip(panels, shares.items(), strict=True):
        for way, rows in _by_way(values["distances"]).items():
            x, y = [row["sessions"] for row in rows], [100 * row[share] for row in rows]
            _line(axes, way, rows[0]["title"], x, y)
        axes.axhline(100, color="#555555", linewidth=1)
        axes.set_title(title, fontsize=12)
        _sessions_axis(axes, values["distances"])
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("% of the limit (100: it cannot be faster)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _growth(values: dict[str, Any]) -> Figure:
    figure, panels = _figure("A later turn's first token as work grows", panels=2)
    titles = {row["way"]: row["title"] for row in values["rows"]}
    sizes = {
        "context": "tokens said before",
        "idle_sessions": "open sessions beside it",
    }
    for axes, (size, title) in zip(panels, sizes.items(), strict=True):
        for way, points in values["growth"].items():
            some = [
                point for point in points if bool(point["idle_sessions"]) == (size != "context")
            ]
            x = [point[size] for point in some]
            _line(axes, way, titles[way], x, [point["first_token_ms"] for point in some])
        axes.set_xlabel(title)
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_formatter(FuncFormatter(_numbers))
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON that a command wrote")
    options = parser.parse_args(arguments)
    try:
        files = draw(options.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(f"drawn: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
