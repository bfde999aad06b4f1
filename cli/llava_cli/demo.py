"""`llava-triton demo`: a conversation about a picture, through a real Triton server, turn by turn.

The same conversation runs twice: in a session, where every turn sends and computes only what is
new, and without one, where every turn sends the picture and everything said before once more.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llava_cli.files import SHARED
from llava_triton.client import Answer, Session
from llava_triton.contract.errors import SessionError
from llava_triton.server.triton_server import ServerError, TritonServer, free_ports

MAX_TOKENS = 96


def in_a_session(url: str, picture: Path, questions: Sequence[str]) -> list[Answer]:
    """Ask everything in one session, printing the answers as they come."""
    answers = []
    began = time.perf_counter()
    with Session.open(url, image=picture) as session:
        print(f"Session opened on {picture.name} in {since(began)}: sent, encoded and prefilled.\n")
        for question in questions:
            print(f"  You    {question}\n  LLaVA  ", end="", flush=True)
            stream = session.stream(question, max_tokens=MAX_TOKENS)
            for piece in stream:
                print(piece, end="", flush=True)
            answers.append(stream.answer)
            print(f"\n         {numbers(stream.answer)}\n")
    return answers


def without_a_session(url: str, picture: Path, turns: Sequence[tuple[str, str]]) -> list[Answer]:
    """Ask everything again, each time in a session of its own that is told all of the past.

    The past travels as text in the checkpoint's own format, so the model sees the same tokens and
    gives the same answers.
    """
    answers = []
    past = ""
    for question, said in turns:
        with Session.open(url) as session:
            stream = session.stream(past + question, image=picture, max_tokens=MAX_TOKENS)
            for _ in stream:
                pass
            answers.append(stream.answer)
        past += f"{question} ASSISTANT: {said}</s>USER: "
    return answers


def numbers(answer: Answer) -> str:
    """One line about what an answer cost."""
    return (
        f"first token {answer.first_token_seconds * 1000:.1f} ms, "
        f"{answer.num_output_tokens} tokens; prompt tokens: {answer.num_computed_tokens} computed, "
        f"{answer.num_cached_tokens} reused"
    )


def comparison(session: Sequence[Answer], stateless: Sequence[Answer]) -> str:
    """The two runs side by side."""
    head = "        in the session                    without a session\n"
    head += "  turn  first token  computed  reused     first token  computed  reused  same answer\n"
    rows = []
    for turn, (kept, again) in enumerate(zip(session, stateless, strict=True), start=1):
        rows.append(
            f"  {turn:4}  {kept.first_token_seconds * 1000:8.1f} ms  {kept.num_computed_tokens:8}"
            f"  {kept.num_cached_tokens:6}     {again.first_token_seconds * 1000:8.1f} ms"
            f"  {again.num_computed_tokens:8}  {again.num_cached_tokens:6}"
            f"  {'yes' if kept.text == again.text else 'NO'}"
        )
    return head + "\n".join(rows)


def since(began: float) -> str:
    """Time since `began`, for a person."""
    return f"{time.perf_counter() - began:.2f} s"


def run(repository: Path) -> int:
    """Run the demo on its exported model; the exit status says whether both ways gave the same
    answers."""
    talk = json.loads((SHARED / "demo" / "conversation.json").read_text())
    picture = SHARED / talk["picture"]
    questions = [turn["question"] for turn in talk["turns"]]
    print("Starting Triton ... ", end="", flush=True)
    began = time.perf_counter()
    try:
        with TritonServer(repository, *free_ports(3)) as server:
            print(f"ready in {since(began)}.\n")
            session = in_a_session(server.grpc_url, picture, questions)
            turns = list(zip(questions, (answer.text for answer in session), strict=True))
            stateless = without_a_session(server.grpc_url, picture, turns)
            print(comparison(session, stateless))
            print("\nStopping Triton ... ", end="", flush=True)
    except (ServerError, SessionError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print("stopped.")
    same = all(a.text == b.text for a, b in zip(session, stateless, strict=True))
    return 0 if same else 1
