"""`make profile`: whole sessions under NVIDIA's perf_analyzer.

Every session opens with a picture and a question and goes on with questions alone; `llava` is
driven over HTTP and `llava_stream` over gRPC, with several sessions at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.findings import ROOT, table
from benchmarks.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, Turn, write_sessions
from llava_triton.server.triton_server import ServerError, TritonServer, free_ports

PICTURES = ROOT / "examples" / "pictures"
QUESTIONS = (
    "What is in the picture?",
    "How many objects are there?",
    "Describe the picture.",
    "Which of them is the largest?",
)
# Answers of one length, so that runs can be compared.
PARAMETERS = {"max_tokens": 16, "ignore_eos": True}


@dataclass(frozen=True)
class Row:
    """One model at one concurrency. Times are in milliseconds."""

    model: str
    protocol: str
    sessions_at_once: int
    turns: int
    turns_per_second: float
    opening_first_response_p50: float
    later_first_response_p50: float
    later_first_response_p95: float
    opening_whole_p50: float
    later_whole_p50: float
    later_whole_p95: float


def summarize(model: str, protocol: str, concurrency: int, turns: Sequence[Turn]) -> Row:
    """Percentiles over the turns of one run."""
    opening = [turn for turn in turns if turn.opening]
    later = [turn for turn in turns if not turn.opening]

    def percentile(of: list[Turn], time: Callable[[Turn], float], rank: float) -> float:
        return round(1000 * float(np.percentile([time(turn) for turn in of], rank)), 2)

    def first(turn: Turn) -> float:
        return turn.first_response

    def whole(turn: Turn) -> float:
        return turn.whole

    seconds = max(turn.responses[-1] for turn in turns) - min(turn.sent for turn in turns)
    return Row(
        model=model,
        protocol=protocol,
        sessions_at_once=concurrency,
        turns=len(turns),
        turns_per_second=round(len(turns) / seconds, 2),
        opening_first_response_p50=percentile(opening, first, 50),
        later_first_response_p50=percentile(later, first, 50),
        later_first_response_p95=percentile(later, first, 95),
        opening_whole_p50=percentile(opening, whole, 50),
        later_whole_p50=percentile(later, whole, 50),
        later_whole_p95=percentile(later, whole, 95),
    )


def measure(
    http_address: str,
    grpc_address: str,
    picture: Path,
    output: Path,
    concurrencies: Sequence[int],
    sessions: int,
) -> list[Row]:
    """Run perf_analyzer on both models at every concurrency.

    Args:
        sessions: whole sessions for each one that runs at a time.
    """
    output.mkdir(parents=True, exist_ok=True)
    print("getting perf_analyzer ...", flush=True)
    analyzer = PerfAnalyzer(ROOT / "build" / "perf_analyzer")
    data = output / "sessions.json"
    write_sessions(data, picture.read_bytes(), QUESTIONS, PARAMETERS)
    rows = []
    for model, protocol, address in (
        ("llava", "HTTP", http_address),
        ("llava_stream", "gRPC", grpc_address),
    ):
        for warm_up, concurrency in [(True, 1), *((False, each) for each in concurrencies)]:
            if not warm_up:
                print(f"{model} over {protocol}, {concurrency} at a time ...", flush=True)
            turns = analyzer.run(
                model,
                address,
                data,
                streaming=protocol == "gRPC",
                concurrency=concurrency,
                requests=len(QUESTIONS) * (1 if warm_up else sessions * concurrency),
                raw=output / "raw",
            )
            if not warm_up:
                rows.append(summarize(model, protocol, concurrency, turns))
    return rows


COLUMNS = (
    "model",
    "protocol",
    "at a time",
    "turns/s",
    "opening: first response",
    "later: first response",
    "p95",
    "opening: whole answer",
    "later: whole answer",
    "p95",
)


def report(rows: Sequence[Row], sessions: int, picture: Path) -> str:
    """The table for people, in Markdown."""
    cells = [
        (
            *(row.model, row.protocol, str(row.sessions_at_once), f"{row.turns_per_second:.1f}"),
            f"{row.opening_first_response_p50:.1f}",
            f"{row.later_first_response_p50:.1f}",
            f"{row.later_first_response_p95:.1f}",
            f"{row.opening_whole_p50:.1f}",
            f"{row.later_whole_p50:.1f}",
            f"{row.later_whole_p95:.1f}",
        )
        for row in rows
    ]
    introduction = f"""\
# Whole sessions under perf_analyzer

Sessions of {len(QUESTIONS)} turns: the opening one has {picture.name} and a question, the later
ones only a question. Answers of {PARAMETERS["max_tokens"]} tokens; {sessions} sessions for each
one at a time. Times in milliseconds as the client sees them, medians and 95th percentiles. The
first response of `llava` is the whole answer; that of `llava_stream`, its first piece.

"""
    return introduction + table(COLUMNS, cells)


def _pictures() -> list[Path]:
    return sorted(path for path in PICTURES.glob("*") if path.suffix in {".png", ".jpg", ".jpeg"})


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the report, write report.md and report.csv; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "build/repositories/demo")
    parser.add_argument("--http-address", help="host:port of a running server (default: start one)")
    parser.add_argument("--grpc-address", help="the same server's host:port for gRPC")
    parser.add_argument("--picture", type=Path, help="default: the first in examples/pictures")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sessions", type=int, default=10, help="for each one at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "build/profile")
    options = parser.parse_args(arguments)
    if bool(options.http_address) != bool(options.grpc_address):
        parser.error("--http-address and --grpc-address belong together")
    picture = options.picture or next(iter(_pictures()), None)
    if picture is None or not picture.is_file():
        parser.error(f"no picture at {picture or PICTURES}; name one with --picture")
    try:
        with contextlib.ExitStack() as stack:
            http_address, grpc_address = options.http_address, options.grpc_address
            if not http_address:
                print(f"starting Triton on {options.repository} ...", flush=True)
                server = stack.enter_context(TritonServer(options.repository, *free_ports(3)))
                http_address, grpc_address = server.http_address, server.grpc_address
            rows = measure(
                http_address,
                grpc_address,
                picture,
                options.output,
                options.concurrency,
                options.sessions,
            )
    except (PerfAnalyzerError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = report(rows, options.sessions, picture)
    (options.output / "report.md").write_text(text)
    with (options.output / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"\n{text}\nwritten to {options.output}/report.md and report.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
