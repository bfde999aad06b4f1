"""`make bench-adapter`: what the session adapter costs beside gRPC straight to Triton.

One server on the geometry of `make bench`; sessions stream their answers from it by gRPC (T) and
through the adapter, as server-sent events over HTTP (A), in turns: T A A T T A ... The client
times everything, the first token too. What the engine itself took for that, by its own clock, is
taken off: from load to load it differs by more than the adapter costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.doors import ADAPTER_PATH, Http
from benchmarks.findings import BUILD, Verdict, about, table, verdict_table, write_results
from benchmarks.load import TransportWay, hold
from benchmarks.stand import adapter
from benchmarks.workload import Workload
from llava_triton.client.grpc import GrpcTransport
from llava_triton.server.triton_server import TritonServer, free_ports

HOLDS = (1, 1, 1, 16)
"""Numbers of sessions at once, each held in every round."""
MOST_MS = 2.0
MOST_SHARE = 0.10


def measure(workload: Workload, rounds: int, log: Path) -> dict[str, dict[str, list[float]]]:
    """For each way its later first tokens at 1 session, whole and around the engine (ms), and
    tokens per second at 16."""
    repository = Path(workload.repository)
    with (
        TritonServer(repository, *free_ports(3), log=log) as server,
        adapter(server.grpc_address, repository) as running,
    ):
        ways = {
            "T": TransportWay(lambda: GrpcTransport(server.grpc_address)),
            "A": TransportWay(lambda: Http(running.port, ADAPTER_PATH)),
        }
        found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ways}
        for way in ways.values():
            hold(way, workload, 0, 1, 2)  # warms up
        number = 0
        for index in range(rounds):
            for name in ("TA", "AT")[index % 2]:
                for sessions in HOLDS:
                    number += 1  # pictures and questions that nobody has asked yet
                    load = hold(ways[name], workload, number, sessions, workload.turns)
                    if sessions > 1:
                        found[name]["tokens_per_second"].append(load.tokens_per_second)
                        continue
                    for time in ("first_token_ms", "around_engine_ms"):
                        later = [getattr(each, time) for each in load.turns if each.turn > 0]
                        found[name][time].append(statistics.median(later))
                print(f"  round {index + 1}, {name}: done", flush=True)
    return found


def report(found: dict[str, dict[str, list[float]]]) -> tuple[str, dict[str, Any]]:
    """A table, and what it says."""
    titles = {
        "first_token_ms": "later first token, ms",
        "around_engine_ms": "around the engine, ms",
        "tokens_per_second": "tokens/s, 16 sessions",
    }
    rows = []
    for way, title in (("T", "gRPC"), ("A", "the session adapter")):
        figures = [statistics.median(found[way][name]) for name in titles]
        rows.append((title, *(f"{figure:.1f}" for figure in figures)))
    whole_ms = _of_pairs(found, "first_token_ms", lambda a, t: a - t)
    cost_ms = _of_pairs(found, "around_engine_ms", lambda a, t: a - t)
    cost_share = 1.0 - _of_pairs(found, "tokens_per_second", lambda a, t: a / t)
    costs = (f"{whole_ms:.2f}", f"{cost_ms:.2f}", f"{100 * cost_share:.1f} %")
    rows.append(("cost, pair by pair", *costs))
    judged = [
        Verdict("around the engine", cost_ms, MOST_MS, unit="ms"),
        Verdict("tokens/s, 16 sessions", 100 * cost_share, 100 * MOST_SHARE, unit="%"),
    ]
    values = {"found": found, "whole_ms": whole_ms, "cost_ms": cost_ms, "cost_share": cost_share}
    values["targets"] = [verdict.values() for verdict in judged]
    return f"{table(('', *titles.values()), rows)}\n{verdict_table(judged)}", values


def _of_pairs(
    found: dict[str, dict[str, list[float]]], name: str, compare: Callable[[float, float], float]
) -> float:
    """The median over the pairs of (A, T)."""
    pairs = zip(found["A"][name], found["T"][name], strict=True)
    return statistics.median(compare(a, t) for a, t in pairs)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny; figures mean nothing")
    parser.add_argument("--output", type=Path, default=BUILD / "adapter.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="llava-bench-") as name:
        folder = Path(name)
        bench = Bench(folder, HOLDS, quick=options.quick)
        bench.prepare(["T"])
        found = measure(bench.workload("T"), options.rounds, folder / "triton.log")
    table, values = report(found)
    write_results(options.output, table, values, about())
    return 0


if __name__ == "__main__":
    sys.exit(main())
