"""What a session can be asked besides its next turn, through the real server."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from llava_triton.client import Answer, Session
from llava_triton.client.opening import Address
from llava_triton.client.session import connect
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
        with pytest.raises(SessionError, match="rewind is -1; it must be"):
            session.rewind(-1)
        with pytest.raises(SessionError, match="to turn 2; it has 1 completed turns") as caught:
            session.rewind(2)
        assert caught.value.code is ErrorCode.INVALID_ARG
        assert session.ask(QUESTIONS[1], max_tokens=30).text == told[1].text


def test_a_session_that_forgets_its_oldest_turns(url: str) -> None:
    with Session.open(url, image=PICTURE, truncation="auto") as session:
        told: list[Answer] = []
        while not told or not told[-1].num_forgotten_turns:
            told.append(session.ask(QUESTIONS[len(told) % 3] * 4, max_tokens=20))
            assert len(told) < 60
        forgotten = told[-1].num_forgotten_turns
        assert 1 < forgotten < len(told) - 1
        assert told[-1].num_input_tokens < told[-2].num_input_tokens
        assert told[-1].num_cached_tokens > 0  # the picture's
        again = session.ask(QUESTIONS[0], max_tokens=20)
        assert again.num_forgotten_turns == forgotten
        assert again.num_cached_tokens >= told[-1].num_input_tokens
        session.rewind(len(told))
        assert session.ask(QUESTIONS[0], max_tokens=20).text == again.text
        with pytest.raises(SessionError, match="oldest turns be forgotten") as caught:
            session.ask("And what about it? " * 300, truncation="disabled")
        assert caught.value.code is ErrorCode.INVALID_ARG
        with pytest.raises(SessionError, match='truncation is "always"; it must be "auto" or'):
            session.ask("And?", truncation="always")


def test_a_regenerated_answer_is_streamed(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        told = session.ask(QUESTIONS[0], max_tokens=30)
        stream = session.stream_again(max_tokens=30)
        assert "".join(stream) == told.text
        assert stream.answer.num_computed_tokens == 1
        for _ in session.stream_again(max_tokens=600, ignore_eos=True):
            break
        assert session.regenerate(max_tokens=30).text == told.text


def test_a_stopped_answer_is_kept(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        stream = session.stream("Go on.", max_tokens=600, ignore_eos=True)
        said = ""
        for piece in stream:
            said += piece
            stream.stop()
            stream.stop()
        stopped = stream.answer
        assert (stopped.text, stopped.finish_reason) == (said, "stopped")
        assert 0 < stopped.num_output_tokens < 600
        later = session.ask(QUESTIONS[0], max_tokens=30)
        said_tokens = stopped.num_input_tokens + stopped.num_output_tokens
        assert later.num_cached_tokens >= said_tokens - 1
        stream.stop()  # it has ended
        session.rewind(1)
        assert session.ask(QUESTIONS[0], max_tokens=30).text == later.text
    with Session.open(server.grpc_url, image=PICTURE) as session:  # one that wants no more
        short = session.ask("Go on.", max_tokens=stopped.num_output_tokens, ignore_eos=True)
        assert short.text == said
        assert session.ask(QUESTIONS[0], max_tokens=30).text == later.text


def test_an_answer_is_stopped_before_it_begins(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        stream = session.stream("Go on.", max_tokens=600, ignore_eos=True)
        stream.stop()
        assert "".join(stream) == stream.answer.text
        assert stream.answer.finish_reason == "stopped"
        assert session.regenerate(max_tokens=3, ignore_eos=True).num_output_tokens == 3


def test_an_answer_that_is_wanted_whole_is_stopped(url: str) -> None:
    """By whoever knows its session, over either protocol."""

    def talk() -> Answer:
        with Session.open(url, session_id="to be stopped") as session:
            return session.ask("Go on.", max_tokens=600, ignore_eos=True)

    with (
        ThreadPoolExecutor(1) as beside,
        contextlib.closing(connect(Address.of(url), None)) as transport,
    ):
        asked = beside.submit(talk)
        while not asked.done():
            with contextlib.suppress(SessionError):  # not open yet, or closed
                transport.stop_answer("to be stopped")
    assert asked.result().finish_reason == "stopped"
    assert asked.result().num_output_tokens < 600


def test_a_fork_computes_nothing_and_goes_its_own_way(url: str) -> None:
    with Session.open(url, image=PICTURE) as session:
        told = [session.ask(question, max_tokens=30) for question in QUESTIONS]
        with session.fork() as fork:
            assert fork.id != session.id
            end = told[2].num_input_tokens + told[2].num_output_tokens
            again = fork.ask(QUESTIONS[0], max_tokens=30)
            assert again.num_cached_tokens >= end - 1
            assert session.ask(QUESTIONS[0], max_tokens=30).text == again.text
            fork.rewind(1)
            session.close()
            assert fork.ask(QUESTIONS[1], max_tokens=30).text == told[1].text
            with pytest.raises(SessionError, match="unknown or has expired") as caught:
                session.fork()
            assert caught.value.code is ErrorCode.NOT_FOUND


def test_tenants_neither_fork_nor_stop_one_another(url: str) -> None:
    bob = connect(Address.of(url), "bob")
    with Session.open(url, tenant="alice") as session, contextlib.closing(bob):
        with pytest.raises(SessionError) as caught:
            bob.stop_answer(session.id)
        assert caught.value.code is ErrorCode.NOT_FOUND
        with pytest.raises(SessionError) as caught:
            bob.fork(session.id, None)
        assert caught.value.code is ErrorCode.NOT_FOUND
        with session.fork("alice's other") as fork:
            assert fork.ask("Hello!", max_tokens=3).num_output_tokens


@pytest.mark.parametrize("module", [tritonclient.grpc, tritonclient.http], ids=["grpc", "http"])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("rewind", -1, "rewind is -1; it must be the number of turns to keep"),
        ("rewind", "1", "rewind is '1'; it must be"),
        ("rewind", True, "rewind is True; it must be"),
        ("regenerate", 1, "regenerate is 1; it must be true or false"),
        ("regenerate", True, "no answer to regenerate"),
        ("fork", "", "fork is ''; it must be the ID of an open session"),
        ("fork", "x", "send it with the sequence start flag"),
        ("stop_answer", 0, "stop_answer is 0; it must be the ID"),
        ("stop_answer", "x", "stop_answer came with a turn"),
        ("cancel_answer", 0, "cancel_answer is 0; it must be the ID"),
        ("cancel_answer", "x", "cancel_request is ''; beside cancel_answer it must be"),
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
