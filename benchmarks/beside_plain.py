"""`python -m benchmarks.beside_plain`: what one turn that asks for more costs 16 plain ones.

An engine in this process has 17 answers at once: 16 plain, and one that is plain too, tells log
probabilities, or has a form. In turns, so that all have the machine as it is. What counts is the
tokens per second of the 16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_way import EngineWay
from benchmarks.findings import BUILD, Verdict, about, table, verdict_table, write_results
from benchmarks.load import Ask, exactly, joint_tokens_per_second
from llava_triton.contract.structured_outputs import StructuredOutputs

REPOSITORY = Path("build/repositories/demo")
PLAIN = 16
TOKENS = 200
ROUNDS = 5
MOST_PERCENT = 5.0
KINDS: dict[str, dict[str, Any]] = {
    "plain": exactly(TOKENS),
    "logprobs": {**exactly(TOKENS), "logprobs": 20},
    "a form": {
        "max_tokens": TOKENS,
        "structured_outputs": StructuredOutputs(regex="[a-z ]{600,}"),
    },
}


def measure(way: EngineWay, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of the plain answers, by what was beside them."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for kind, sampling in KINDS.items():
            name = f"{number} {kind}"
            other = way.ask(Ask(f"{name} other", True, True, "Tell me all.", sampling=sampling))
            plain = [
                way.ask(Ask(f"{name} {each}", True, True, f"Say {each}.", sampling=exactly(TOKENS)))
                for each in range(PLAIN)
            ]
            per_second = joint_tokens_per_second([answer.wait() for answer in plain])
            other.wait()
            if number and per_second is not None:  # the first round warms up
                found[kind].append(per_second)
    return found


def report(found: Mapping[str, Sequence[float]]) -> tuple[str, dict[str, Any]]:
    """A table, and what it says."""
    medians = {kind: statistics.median(each) for kind, each in found.items()}
    costs = {kind: 100 * (1 - median / medians["plain"]) for kind, median in medians.items()}
    rows = [(kind, f"{medians[kind]:.1f}", f"{costs[kind]:.1f} %") for kind in medians]
    judged = [
        Verdict(f"{kind} beside {PLAIN} plain ones", cost, MOST_PERCENT, unit="%")
        for kind, cost in costs.items()
        if kind != "plain"
    ]
    heads = ("beside them", f"tokens/s of {PLAIN}", "cost")
    values = {"found": dict(found), "targets": [verdict.values() for verdict in judged]}
    return f"{table(heads, rows)}\n{verdict_table(judged)}", values


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=BUILD / "beside-plain.json")
    options = parser.parse_args(arguments)
    way = EngineWay.of_repository(options.repository, options.dtype)
    try:
        text, values = report(measure(way, options.rounds))
    finally:
        way.close()
    write_results(options.output, text, values, about())
    return 0


if __name__ == "__main__":
    sys.exit(main())
