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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.doors import ADAPTER_PATH, Http
from benchmarks.measurement import TurnTimes
from benchmarks.provenance import BUILD, about, write_results
from benchmarks.stand import adapter
from benchmarks.triton_load import TritonLoad
from benchmarks.workload import Workload
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
        loads = {
            "T": TritonLoad(workload, server),
            "A": TritonLoad(workload, server, lambda: Http(running.port, ADAPTER_PATH)),
        }
        found: dict[str, dict[str, list[float]]] = {
            way: {"first_token_ms": [], "around_engine_ms": [], "tokens_per_second": []}
            for way in loads
        }
        number = 0
        for index in range(rounds):
            for way in ("TA", "AT")[index % 2]:
                for sessions in HOLDS:
                    number += 1  # pictures and questions that nobody has asked yet
                    seconds, turns = loads[way].hold_number(number, sessions, workload.turns)
                    if sessions == 1:
                        for name in ("first_token_ms", "around_engine_ms"):
                            later = [getattr(each, name) for each in turns if each.turn > 0]
                            found[way][name].append(statistics.median(later))
                    else:
                        rate = _tokens(turns) / seconds
                        found[way]["tokens_per_second"].append(rate)
                print(f"  round {index + 1}, {way}: done", flush=True)
    return found


def _tokens(turns: list[TurnTimes]) -> int:
    return sum(turn.output_tokens for turn in turns)


def report(found: dict[str, dict[str, list[float]]]) -> tuple[str, dict[str, Any]]:
    """A table, and what it says."""
    titles = {
        "first_token_ms": "later first token, ms",
        "around_engine_ms": "around the engine, ms",
        "tokens_per_second": "tokens/s, 16 sessions",
    }
    lines = [f"{'':22}" + "".join(f"{title:>23}" for title in titles.values())]
    for way, title in (("T", "gRPC"), ("A", "the session adapter")):
        figures = [statistics.median(found[way][name]) for name in titles]
        lines.append(f"{title:22}" + "".join(f"{figure:23.1f}" for figure in figures))
    whole_ms = _of_pairs(found, "first_token_ms", lambda a, t: a - t)
    cost_ms = _of_pairs(found, "around_engine_ms", lambda a, t: a - t)
    cost_share = 1.0 - _of_pairs(found, "tokens_per_second", lambda a, t: a / t)
    costs = f"{whole_ms:23.2f}{cost_ms:23.2f}{100 * cost_share:21.1f} %"
    lines.append(f"{'cost, pair by pair':22}{costs}")
    lines.append(
        f"{'target':22}{'':23}{f'<= {MOST_MS:g}':>23}{f'<= {100 * MOST_SHARE:g} %':>23}   "
        + ("met" if cost_ms <= MOST_MS and cost_share <= MOST_SHARE else "NOT MET")
    )
    values = {"found": found, "whole_ms": whole_ms, "cost_ms": cost_ms, "cost_share": cost_share}
    return "\n".join(lines), values


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
