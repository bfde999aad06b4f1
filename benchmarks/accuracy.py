"""`make accuracy`: what a reduced precision costs the demo checkpoint, question by question.

The conversations of `make evaluate` about pictures that the checkpoint has never seen, held with
our engine in each dtype, the model's own earlier answers as the history. An answer counts when it
is the expected one, word for word.
"""

from __future__ import annotations

import argparse
import io
import json
import queue
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.engine_load import PATIENCE_SECONDS, Encoder, make_engine
from demo.conversations import random_conversation
from demo.data import EVALUATION, picture, stream
from demo.evaluate import Asked, share
from llava_triton.delta import Delta
from llava_triton.engine import Engine, TurnRequest
from llava_triton.errors import SessionError
from llava_triton.sampling_parameters import SamplingParameters

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ROOT / "build" / "repositories" / "demo"
OUTPUT = ROOT / "benchmarks" / "results" / "cpu-accuracy.json"
DTYPES = ("float32", "bfloat16")
MAX_TOKENS = 96


def answers(repository: Path, dtype: str, questions: int) -> list[Asked]:
    """At least so many questions, asked of an engine in this dtype."""
    engine, encoder = make_engine(repository, dtype), Encoder(repository)
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
            image_features=encoder.features(next(pictures)) if turn.picture else None,
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


def report(results: dict[str, list[Asked]]) -> str:
    """A line a dtype."""
    first = results[DTYPES[0]]
    lines = [
        f"{'dtype':10} {'questions':>9} {'correct':>8} {'share':>8} {'other than in float32':>22}"
    ]
    for dtype, asked in results.items():
        correct = sum(one.correct for one in asked)
        lines.append(
            f"{dtype:10} {len(asked):9} {correct:8} {100 * share(asked):6.2f} % "
            f"{_different(first, asked):22}"
        )
    return "\n".join(lines)


def _different(one: Sequence[Asked], other: Sequence[Asked]) -> int:
    return sum(a.answer != b.answer for a, b in zip(one, other, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--questions", type=int, default=1500, help="ask at least so many")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON (%(default)s)")
    options = parser.parse_args(arguments)
    results = {}
    for dtype in DTYPES:
        print(f"{options.questions} questions in {dtype} ...", flush=True)
        results[dtype] = answers(options.repository, dtype, options.questions)
    print(report(results))
    values = {
        dtype: {
            "questions": len(asked),
            "correct": sum(one.correct for one in asked),
            "other_than_float32": _different(results[DTYPES[0]], asked),
        }
        for dtype, asked in results.items()
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(values, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
