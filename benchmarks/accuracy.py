"""`make accuracy`: what a reduced precision costs the demo checkpoint, and what it gains.

The cost: the conversations of `make evaluate` about pictures that the checkpoint has never seen,
held with our engine in each precision, the model's own earlier answers as the history. An answer
counts when it is the expected one, word for word. The gain: the time between tokens of one session
in the benchmark's geometry, whose arithmetic is worth measuring; the precisions take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import queue
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.engine_load import PATIENCE_SECONDS, Encoder, make_engine
from benchmarks.measurement import Load, read_loads
from benchmarks.provenance import BUILD, ROOT, about, write_results
from benchmarks.workload import FULL, QUICK, Geometry, Workload, write_checkpoint
from demo.conversations import random_conversation
from demo.data import EVALUATION, picture, stream
from demo.evaluate import Asked, share
from llava_export.repository import ExportJob, export
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.engine import Engine, TurnRequest
from llava_triton.server.triton_server import CPU_ENVIRONMENT

REPOSITORY = ROOT / "build" / "repositories" / "demo"
PRECISIONS = {
    "float32": ("float32", "unrounded"),
    "float32, int8 weights": ("float32", "int8"),
    "bfloat16": ("bfloat16", "unrounded"),
    "bfloat16, int8 weights": ("bfloat16", "int8"),
}
"""Values of `Settings.dtype` and `Settings.weights`."""
MAX_TOKENS = 96
ROUNDS = 3


def answers(repository: Path, precision: str, questions: int) -> list[Asked]:
    """At least so many questions, asked of an engine in this precision."""
    engine, encoder = make_engine(repository, *PRECISIONS[precision]), Encoder(repository)
    asked: list[Asked] = []
    number = 0
    try:
        while len(asked) < questions:
            asked += hold(engine, encoder, number)
            number += 1
    finally:
        engine.shutdown()
    return asked


def hold(engine: Engine, encoder: Encoder, number: int) -> list[Asked]:
    """One conversation, in a session of its own."""
    rng = stream(EVALUATION, number)
    conversation = random_conversation(rng, turns=rng.randint(4, 10))
    pictures = iter([_encoded(picture(scene, rng)) for scene in conversation.scenes])
    asked = []
    for index, turn in enumerate(conversation.turns):
        request = TurnRequest(
            session_id=f"conversation {number}",
            start=index == 0,
            end=index == len(conversation.turns) - 1,
            text=turn.question,
            image_features=(encoder.features(next(pictures)),) if turn.picture else (),
            sampling=SamplingParameters(max_tokens=MAX_TOKENS),
        )
        answer = _ask(engine, request)
        asked.append(Asked(number, turn.kind, turn.follow_up, turn.question, turn.answer, answer))
    return asked


def _ask(engine: Engine, request: TurnRequest) -> str:
    events: queue.SimpleQueue[Delta | SessionError] = queue.SimpleQueue()
    engine.submit(request, events.put)
    text = ""
    while True:
        event = events.get(timeout=PATIENCE_SECONDS)
        if isinstance(event, SessionError):
            raise event
        text += event.text
        if event.is_final:
            return text


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def between_tokens(geometry: Geometry, rounds: int, precisions: Sequence[str]) -> dict[str, float]:
    """Median milliseconds between the tokens of one session's answers, by precision."""
    with tempfile.TemporaryDirectory(prefix="llava-accuracy-") as folder:
        checkpoint, repository = Path(folder) / "checkpoint", Path(folder) / "repository"
        write_checkpoint(checkpoint, geometry)
        export(ExportJob(str(checkpoint), repository))
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
    command = [sys.executable, "-m", "benchmarks.engine_load", "--sessions", "1"]
    command += ["--workload", str(file), "--output", str(output), "--weights", weights]
    environment = os.environ | CPU_ENVIRONMENT
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return read_loads(output)


def report(results: Mapping[str, list[Asked]], times: Mapping[str, float]) -> str:
    """A line a precision; the first is what the others are compared with."""
    first_precision, first = next(iter(results.items()))
    lines = [
        f"{'':24} {'questions':>9} {'correct':>8} {'share':>8} {'other than the first':>22}"
        f" {'between tokens, ms':>19} {'speed-up':>9}"
    ]
    for precision, asked in results.items():
        correct = sum(one.correct for one in asked)
        lines.append(
            f"{precision:24} {len(asked):9} {correct:8} {100 * share(asked):6.2f} % "
            f"{_different(first, asked):22} {times[precision]:19.2f}"
            f" {times[first_precision] / times[precision]:9.2f}"
        )
    return "\n".join(lines)


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
