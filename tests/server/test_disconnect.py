"""Clients that go away in mid-stream."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from llava_triton.server.triton_server import TritonServer
from tests.triton import Answer, Stream, ask

ROOT = Path(__file__).resolve().parents[2]
PICTURE = sorted((ROOT / "examples" / "pictures").glob("*.*"))[0]
LIMIT = {"max_tokens": 24}
LONG = {"max_tokens": 700, "ignore_eos": True}
QUESTIONS = ("Describe the picture.", "How many shapes are there?")

STREAM_PAST_THE_ENSEMBLE = """
import asyncio
import sys
from llava_sagemaker.adapter.turns import Triton, turn

async def stream():
    asked = turn(sys.argv[2], text="Go on.", sampling={parameters})
    async for piece in Triton(sys.argv[1]).pieces(asked):
        print("piece", flush=True)

asyncio.run(stream())
"""

STREAM_FOREVER = """
import sys
from tests.triton import Stream

with Stream(sys.argv[1]) as stream:
    for piece in stream.turn("Go on.", session=sys.argv[2], parameters={parameters}):
        print("piece", flush=True)
"""


def answers_of_an_undisturbed_session(client: Any) -> list[str]:
    session = uuid.uuid4().hex
    picture = [PICTURE.read_bytes()]
    first = ask(client, QUESTIONS[0], session=session, images=picture, start=True, parameters=LIMIT)
    second = ask(client, QUESTIONS[1], session=session, end=True, parameters=LIMIT)
    return [first.text, second.text]


def test_a_cancelled_stream_stops_and_is_undone(server: TritonServer, grpc_client: Any) -> None:
    expected = answers_of_an_undisturbed_session(grpc_client)
    session = uuid.uuid4().hex
    picture = [PICTURE.read_bytes()]
    first = ask(
        grpc_client, QUESTIONS[0], session=session, images=picture, start=True, parameters=LIMIT
    )
    with Stream(server.grpc_address) as stream:
        pieces = stream.turn("Go on.", session=session, parameters=LONG)
        next(pieces)
        stream.cancel()
    # The next turn of a session waits for the running one: it is answered once that has stopped.
    second = ask(grpc_client, QUESTIONS[1], session=session, end=True, parameters=LIMIT)
    assert [first.text, second.text] == expected
    # Had the turn run to its end, its 700 tokens would be in the conversation.
    assert second.num_input_tokens < first.num_input_tokens + first.num_output_tokens + 50


def answer_after_a_killed_client(server: TritonServer, grpc_client: Any, program: str) -> Answer:
    """A session's second answer, its client having been killed in the middle of another one."""
    session = uuid.uuid4().hex
    picture = [PICTURE.read_bytes()]
    ask(grpc_client, QUESTIONS[0], session=session, images=picture, start=True, parameters=LIMIT)
    program = program.replace("{parameters}", repr(LONG))
    client = subprocess.Popen(
        [sys.executable, "-c", program, server.grpc_address, session],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"piece\n"
    finally:
        client.kill()
        client.communicate()
    return ask(grpc_client, QUESTIONS[1], session=session, end=True, parameters=LIMIT)


@pytest.mark.parametrize("program", [STREAM_FOREVER, STREAM_PAST_THE_ENSEMBLE])
def test_a_killed_client_stops_its_turn(
    server: TritonServer, grpc_client: Any, program: str
) -> None:
    _, expected = answers_of_an_undisturbed_session(grpc_client)
    # On a busy machine the answer may be complete before the system tells of the client's end.
    for _ in range(5):
        second = answer_after_a_killed_client(server, grpc_client, program)
        if second.num_input_tokens < 200:
            break
    assert second.num_input_tokens < 200
    assert second.text == expected
