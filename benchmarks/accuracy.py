"""`make accuracy`: what a reduced precision costs the demo checkpoint, and what it gains.

The cost: the conversations of `make evaluate` about pictures that the checkpoint has never seen,
held with our engine in each precision, the model's own earlier answers as the history. An answer
counts when it is the expected one, word for word. The gain: the time between tokens of one session
in the benchmark's geometry, whose arithmetic is worth measuring; the precisions take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.engine_way import EngineWay
from benchmarks.export import export
from benchmarks.findings import BUILD, ROOT, about, table, write_results
from benchmarks.load import Ask, Load, Way, read_loads
from benchmarks.pictures import encoded
from benchmarks.workload import FULL, QUICK, Geometry, Workload, write_checkpoint
from demo.conversations import random_conversation
from demo.data import EVALUATION, picture, stream
from demo.evaluate import Asked, share
from llava_triton.server.triton_server import CPU_ENVIRONMENT

REPOSITORY = ROOT / "build" / "repositories" / "demo"
PRECISIONS = {
    "float32": ("float32", "unrounded"),
    "float32, int8 weights": ("float32", "int8"),
    "float32, int4 weights": ("float32", "int4"),
    "bfloat16": ("bfloat16", "unrounded"),
    "bfloat16, int8 weights": ("bfloat16", "int8"),
    "bfloat16, int4 weights": ("bfloat16", "int4"),
}
"""Values of `Settings.dtype` and `Settings.weights`."""
MAX_TOKENS = 96
ROUNDS = 3


def answers(repository: Path, precision: str, questions: int) -> list[Asked]:
    """At least so many questions, asked of an engine in this precision."""
    way = EngineWay.of_repository(repository, *PRECISIONS[precision])
    asked: list[Asked] = []
    number = 0
    try:
        while len(asked) < questions:
            asked += hold(way, number)
            number += 1
    finally:
        way.close()
    return asked


def hold(way: Way, number: int) -> list[Asked]:
    """One conversation, in a session of its own."""
    rng = stream(EVALUATION, number)
    conversation = random_conversation(rng, turns=rng.randint(4, 10))
    pictures = iter([encoded(picture(scene, rng), "PNG") for scene in conversation.scenes])
    asked = []
    for index, turn in enumerate(conversation.turns):
        ask = Ask(
            f"conversation {number}",
            start=index == 0,
            end=index == len(conversation.turns) - 1,
            text=turn.question,
            images=[next(pictures)] if turn.picture else [],
            sampling={"max_tokens": MAX_TOKENS},
        )
        answer = way.ask(ask).wait().text
        asked.append(Asked(number, turn.kind, turn.follow_up, turn.question, turn.answer, answer))
    return asked


def between_tokens(geometry: Geometry, rounds: int, precisions: Sequence[str]) -> dict[str, float]:
    """Median milliseconds between the tokens of one session's answers, by precision."""
    with tempfile.TemporaryDirectory(prefix="llava-accuracy-") as folder:
        checkpoint, repository = Path(folder) / "checkpoint", Path(folder) / "repository"
        write_checkpoint(checkpoint, geometry)
        export(checkpoint, repository, {})
        workload = Workload(str(checkpoint), str(repository), turns=3)
        times: dict[str, list[float]] = {precision: [] for precision in precisions}
        for _ in range(rounds):
            for precision, found in times.items():
                for load in _loads(workload, Path(folder), *PRECISIONS[precision]):
                    found += [
                        each.between_tokens_ms for each in load.turns if each.between_tokens_ms
                    ]
    return {precision: statistics.median(found) for precision, found in times.items()}


def _loads(workload: Workload, folder: Path, dtype: str, weights: str) -> list[Load]:
    """One session, in a process whose threads wait as the server's do."""
    file, output = folder / "workload.json", folder / "loads.json"
    dataclasses.replace(workload, dtype=dtype).write(file)
    command = [sys.executable, "-m", "benchmarks.part", "engine", "--sessions", "1"]
    command += ["--workload", str(file), "--output", str(output), "--weights", weights]
    environment = os.environ | CPU_ENVIRONMENT
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return read_loads(output)


def report(results: Mapping[str, list[Asked]], times: Mapping[str, float]) -> str:
    """A line a precision; the first is what the others are compared with."""
    first_precision, first = next(iter(results.items()))
    rows = [
        (
            *(precision, str(len(asked)), str(sum(one.correct for one in asked))),
            *(f"{100 * share(asked):.2f} %", str(_different(first, asked))),
            *(f"{times[precision]:.2f}", f"{times[first_precision] / times[precision]:.2f}"),
        )
        for precision, asked in results.items()
    ]
    heads = ("", "questions", "correct", "share", "other than the first", "between tokens, ms")
    return table((*heads, "speed-up"), rows)


def _different(one: Sequence[Asked], other: Sequence[Asked]) -> int:
    return sum(a.answer != b.answer for a, b in zip(one, other, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--questions", type=int, default=1500, help="ask at least so many")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--quick", action="store_true", help="a tiny model: tests the command")
    parser.add_argument("--output", type=Path, default=BUILD / "accuracy.json")
    options = parser.parse_args(arguments)
    results = {}
    for precision in options.precisions:
        print(f"{options.questions} questions in {precision} ...", flush=True)
        results[precision] = answers(options.repository, precision, options.questions)
    print("time between tokens in the benchmark's geometry ...", flush=True)
    size, rounds = (QUICK, 1) if options.quick else (FULL, ROUNDS)
    times = between_tokens(size, rounds, options.precisions)
    text = report(results, times)
    first = results[options.precisions[0]]
    precisions = {
        precision: {
            "questions": len(asked),
            "correct": sum(one.correct for one in asked),
            "other_than_first": _different(first, asked),
            "between_tokens_ms": times[precision],
        }
        for precision, asked in results.items()
    }
    write_results(options.output, text, {"precisions": precisions}, about())
    return 0


if __name__ == "__main__":
    sys.exit(main())
