"""What a client may ask of an answer, through every door of the real server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_triton.client import Session
from llava_triton.server.triton_server import TritonServer
from tests.triton import Asker

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "five-shapes.png"
QUESTION = "Describe the picture."


def check_logprobs(told: Sequence[dict[str, Any]], text: str, tokens: int) -> None:
    """One of each token, greedy: the chosen token is the likeliest one."""
    assert len(told) == tokens
    spelled = b"".join(bytes(token["bytes"]) for token in told)
    assert spelled.decode().removeprefix(" ") == text
    for token in told:
        likeliest = token["top_logprobs"]
        assert [each["logprob"] for each in likeliest] == sorted(
            (each["logprob"] for each in likeliest), reverse=True
        )
        assert {key: token[key] for key in ("token", "logprob", "bytes")} == likeliest[0]
        assert len(likeliest) == 2


def test_logprobs_over_each_protocol(asker: Asker) -> None:
    picture = PICTURE.read_bytes()
    plain = asker(QUESTION, session="p", images=[picture], start=True, end=True)
    assert plain.logprobs == ()
    asked = asker(
        QUESTION,
        session="q",
        images=[picture],
        parameters={"logprobs": 2},
        start=True,
        end=True,
    )
    assert asked.text == plain.text
    check_logprobs(asked.logprobs, asked.text, asked.num_output_tokens)


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_by_the_client(server: TritonServer, streamed: bool) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        if streamed:
            stream = session.stream(QUESTION, logprobs=2)
            assert "".join(stream)
            answer = stream.answer
        else:
            answer = session.ask(QUESTION, logprobs=2)
    told = [json.loads(token) for token in answer.logprobs]
    check_logprobs(told, answer.text, answer.num_output_tokens)


def test_penalties_change_an_answer(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        plain = session.ask(QUESTION)
    with Session.open(server.grpc_url, image=PICTURE) as session:
        penalized = session.ask(QUESTION, repetition_penalty=2.0, min_tokens=5, max_tokens=20)
    assert penalized.text != plain.text
    assert 5 <= penalized.num_output_tokens <= 20
