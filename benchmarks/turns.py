"""`make bench`: does a later turn get slower with the picture? In a session, and without one.

Two checkpoints with random weights differ in nothing but the picture: 256 and 1,024 tokens. Each is
served by a real Triton server, over gRPC. The same questions are asked in a session and, beside it,
without one: the picture and everything said before sent and computed again at every turn. The two
take turns, so that both meet the same noise of the machine; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig

from demo.random_checkpoint import write_random_llava
from llava_export.cli import main as export
from llava_triton.client import Answer, Session
from llava_triton.server import TritonServer, free_ports

PICTURE = sorted((Path(__file__).resolve().parents[1] / "examples" / "pictures").glob("*.*"))[0]
PATCH = 14
IMAGE_SIZES = (224, 448)
QUESTIONS = (
    "How many shapes are there?",
    "Which color is the circle?",
    "Where is the square?",
    "Is there a triangle?",
    "What is at the top?",
    "Describe the picture.",
)
ANSWER_TOKENS = 1
"""A model with random weights says bytes that make no character and are held back until the answer
ends; so the answer ends with its first token."""
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Row:
    """Medians of one way to ask, on one size of picture; milliseconds."""

    way: str
    picture_tokens: int
    opening_ms: float
    """In a session: from sending the picture until ready for questions."""
    first_turn_ms: float
    """Time to first token of the first question."""
    later_turns_ms: float
    """Time to first token of the questions after it."""
    computed_tokens: float
    """Prompt tokens computed in a later turn."""


def in_a_session(url: str) -> tuple[float, list[Answer]]:
    """One conversation in a session: seconds to open it, and the answers."""
    with Session.open(url) as session:
        opened = session.add_image(PICTURE)
        return opened.seconds, [streamed(session, question) for question in QUESTIONS]


def without_a_session(url: str) -> list[Answer]:
    """The same conversation, each turn in a session of its own with all of the past."""
    answers: list[Answer] = []
    past = ""
    for question in QUESTIONS:
        with Session.open(url) as session:
            answers.append(streamed(session, past + question, PICTURE))
        # What the model says does not matter for the time; that it says something does.
        past += f"{question} ASSISTANT: {'red ' * ANSWER_TOKENS}</s>USER: "
    return answers


def streamed(session: Session, question: str, picture: Path | None = None) -> Answer:
    """One streamed answer of `ANSWER_TOKENS` tokens."""
    stream = session.stream(question, picture, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    for _ in stream:
        pass
    return stream.answer


def rows(url: str, picture_tokens: int, repeats: int) -> list[Row]:
    """Measure both ways, one after the other, `repeats` times."""
    in_a_session(url)  # warm-up
    openings, kept, again = [], [], []
    for _ in range(repeats):
        seconds, answers = in_a_session(url)
        openings.append(seconds)
        kept.append(answers)
        again.append(without_a_session(url))
    return [
        _row("in a session", picture_tokens, openings, kept),
        _row("without a session", picture_tokens, [0.0], again),
    ]


def _row(way: str, tokens: int, openings: Sequence[float], runs: Sequence[list[Answer]]) -> Row:
    later = [answer for run in runs for answer in run[1:]]
    return Row(
        way=way,
        picture_tokens=tokens,
        opening_ms=statistics.median(openings) * 1000,
        first_turn_ms=statistics.median(run[0].first_token_seconds for run in runs) * 1000,
        later_turns_ms=statistics.median(answer.first_token_seconds for answer in later) * 1000,
        computed_tokens=statistics.median(answer.num_computed_tokens for answer in later),
    )


def table(measured: Sequence[Row]) -> str:
    """The rows for a person, and what follows from them."""
    lines = [
        "                    picture    opening   first token, ms       tokens computed",
        "                     tokens         ms   1st turn  later       in a later turn",
    ]
    for row in measured:
        lines.append(
            f"{row.way:18}  {row.picture_tokens:7}  {row.opening_ms:9.1f}  {row.first_turn_ms:9.1f}"
            f"  {row.later_turns_ms:7.1f}  {row.computed_tokens:12.0f}"
        )
    by_way = {(row.way, row.picture_tokens): row.later_turns_ms for row in measured}
    small, large = ((size // PATCH) ** 2 for size in IMAGE_SIZES)
    for way in ("in a session", "without a session"):
        ratio = by_way[way, large] / by_way[way, small]
        lines.append(f"\nlater turns {way}, {large} picture tokens over {small}: {ratio:.2f} times")
    for tokens in (small, large):
        ratio = by_way["in a session", tokens] / by_way["without a session", tokens]
        lines.append(f"later turns, session over none, {tokens} picture tokens: {ratio:.3f} times")
    return "\n".join(lines)


def main() -> int:
    """Build, serve, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="conversations of each way")
    parser.add_argument("--output", type=Path, default=Path("build/bench/turns.json"))
    arguments = parser.parse_args()
    measured: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in IMAGE_SIZES:
            checkpoint, repository = Path(folder, f"model-{size}"), Path(folder, f"served-{size}")
            vision = CLIPVisionConfig(image_size=size, patch_size=PATCH, **VISION)
            write_random_llava(checkpoint, vision, LlamaConfig, TEXT, least_deviation=0.0)
            if export(["--model", str(checkpoint), "--output", str(repository)]) != 0:
                return 1
            with TritonServer(repository, *free_ports(3)) as server:
                tokens = (size // PATCH) ** 2
                print(f"measuring with {tokens} tokens a picture ...", flush=True)
                measured += rows(server.grpc_url, tokens, arguments.repeats)
    print("\n" + table(measured))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps([asdict(row) for row in measured], indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
