"""What a session can be asked besides its next turn, through the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from llava_triton.client import Session
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.server.triton_server import TritonServer

PICTURE = sorted((Path(__file__).parents[2] / "examples" / "pictures").iterdir())[0]
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "Is there a red circle?")


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return server.grpc_url if request.param == "grpc" else server.http_url


def test_going_back(url: str) -> None:
    with Session.open(url, image=PICTURE) as session:
        told = [session.ask(question, max_tokens=30) for question in QUESTIONS]
        again = session.regenerate(max_tokens=30)
        assert (again.text, again.num_input_tokens) == (told[2].text, told[2].num_input_tokens)
        assert again.num_computed_tokens == 1
        other = session.regenerate(max_tokens=30, temperature=2.0, seed=1)
        assert other.num_computed_tokens == 1
        rewound = session.rewind(1)
        assert (rewound.text, rewound.finish_reason) == ("", "prefilled")
        assert session.ask(QUESTIONS[1], max_tokens=30).text == told[1].text
        opened = session.rewind(0)
        assert opened.num_cached_tokens == opened.num_input_tokens  # the picture's are there
        first = session.ask(QUESTIONS[0], max_tokens=30)
        assert first.text == told[0].text
        assert first.num_cached_tokens >= opened.num_input_tokens
        with pytest.raises(SessionError, match="to turn 2; it has 1 completed turns") as caught:
            session.rewind(2)
        assert caught.value.code is ErrorCode.INVALID_ARG
        assert session.ask(QUESTIONS[1], max_tokens=30).text == told[1].text


def test_a_regenerated_answer_is_streamed(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        told = session.ask(QUESTIONS[0], max_tokens=30)
        stream = session.stream_again(max_tokens=30)
        assert "".join(stream) == told.text
        assert stream.answer.num_computed_tokens == 1
        for _ in session.stream_again(max_tokens=600, ignore_eos=True):
            break
        assert session.regenerate(max_tokens=30).text == told.text


@pytest.mark.parametrize("module", [tritonclient.grpc, tritonclient.http], ids=["grpc", "http"])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("rewind", -1, "rewind is -1; it must be the number of turns to keep"),
        ("rewind", "1", "rewind is '1'; it must be"),
        ("rewind", True, "rewind is True; it must be"),
        ("regenerate", 1, "regenerate is 1; it must be true or false"),
        ("regenerate", True, "no answer to regenerate"),
    ],
)
def test_bad_parameters(
    server: TritonServer, module: Any, name: str, value: Any, sentence: str
) -> None:
    grpc = module is tritonclient.grpc
    with (
        Session.open(server.grpc_url if grpc else server.http_url) as session,
        module.InferenceServerClient(
            server.grpc_address if grpc else server.http_address
        ) as client,
    ):
        with pytest.raises(InferenceServerException, match=sentence):
            client.infer("llava", [], sequence_id=session.id, parameters={name: value})
        assert session.ask("Hello!", max_tokens=3).num_output_tokens
