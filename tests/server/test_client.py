"""The client library on the real server, and what it says when there is none."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from llava_triton.client import ErrorCode, Session, SessionError
from llava_triton.client.transport import LostConnectionError, session_error
from llava_triton.contract.errors import as_session_error, error_from_text
from llava_triton.server.triton_server import TritonServer, free_ports

PICTURE = sorted((Path(__file__).parents[2] / "examples" / "pictures").iterdir())[0]
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "Is there a red circle?")


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return server.grpc_url if request.param == "grpc" else server.http_url


def test_a_conversation(url: str) -> None:
    with Session.open(url, image=PICTURE) as session:
        answers = [session.ask(question, max_tokens=40) for question in QUESTIONS]
    before = 0
    for answer in answers:
        assert answer.text
        assert answer.finish_reason in ("stop", "length")
        assert 0 < answer.num_output_tokens <= 40
        assert answer.num_computed_tokens == answer.num_input_tokens - answer.num_cached_tokens
        # All that was said before has been reused, but for the last token of the answer.
        assert answer.num_cached_tokens >= before - 1
        assert 0 < answer.first_token_seconds <= answer.seconds
        before = answer.num_input_tokens + answer.num_output_tokens


def test_streams_and_whole_answers_are_the_same_over_both_protocols(server: TritonServer) -> None:
    told = []
    for url, streamed in [
        (server.http_url, False),
        (server.grpc_url, False),
        (server.grpc_url, True),
    ]:
        with Session.open(url, image=PICTURE) as session:
            texts = []
            for question in QUESTIONS:
                if streamed:
                    stream = session.stream(question, max_tokens=40)
                    text = "".join(stream)
                    assert stream.answer.text == text
                    assert 0 < stream.answer.first_token_seconds <= stream.answer.seconds
                    texts.append(text)
                else:
                    texts.append(session.ask(question, max_tokens=40).text)
            told.append(texts)
    assert told[0] == told[1] == told[2]


def test_every_way_to_give_a_picture(url: str) -> None:
    picture = Image.open(PICTURE)
    answers = set()
    for form in (PICTURE, str(PICTURE), PICTURE.read_bytes(), picture, [PICTURE], iter([picture])):
        with Session.open(url, image=form) as session:
            answers.add(session.ask(QUESTIONS[0], max_tokens=30).text)
    assert len(answers) == 1


def test_pictures_can_come_later(url: str) -> None:
    with Session.open(url) as session:
        blind = session.ask("Hello!", max_tokens=5)
        shown = session.add_image(PICTURE)
        assert (shown.text, shown.finish_reason) == ("", "prefilled")
        assert shown.num_input_tokens > blind.num_input_tokens + blind.num_output_tokens
        asked = session.ask(QUESTIONS[0], max_tokens=5)
        assert asked.num_cached_tokens >= shown.num_input_tokens - 1
        more = session.ask("And here?", image=PICTURE, max_tokens=5)
        assert more.num_input_tokens > asked.num_input_tokens + 30


def test_an_error_has_its_code_and_leaves_the_session_as_it_was(url: str) -> None:
    with Session.open(url, image=PICTURE) as session, Session.open(url, image=PICTURE) as other:
        with pytest.raises(SessionError, match="temperature is 9") as caught:
            session.ask("And now?", temperature=9)
        assert caught.value.code is ErrorCode.INVALID_ARG
        with pytest.raises(SessionError, match="cannot be sent"):
            session.ask("half \ud83d a pair")
        with pytest.raises(SessionError, match=r"'no-such\.png' cannot be read"):
            session.ask("This?", image="no-such.png")
        assert (
            session.ask(QUESTIONS[0], max_tokens=30).text
            == other.ask(QUESTIONS[0], max_tokens=30).text
        )


def test_a_stream_goes_on_after_an_error(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        expected = session.ask(QUESTIONS[0], max_tokens=30).text
    with Session.open(server.grpc_url, image=PICTURE) as session:
        with pytest.raises(SessionError, match="top_p is 0") as caught:
            list(session.stream("And now?", top_p=0))
        assert caught.value.code is ErrorCode.INVALID_ARG
        assert "".join(session.stream(QUESTIONS[0], max_tokens=30)) == expected


def test_an_expired_session_is_not_found(url: str) -> None:
    with Session.open(url, session_id="closed by another") as session:
        with Session.open(url, session_id="closed by another"):
            pass
        with pytest.raises(SessionError, match="unknown or has expired") as caught:
            session.ask("Still there?")
        assert caught.value.code is ErrorCode.NOT_FOUND


def test_a_session_ends_also_after_an_exception(url: str) -> None:
    def fail() -> None:
        with Session.open(url, session_id=77) as session:
            session.ask("Hello!", max_tokens=3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with Session.open(url) as another:
        another.close()  # twice does no harm
    with Session.open(url) as another:
        another.id = 77
        with pytest.raises(SessionError, match="unknown or has expired"):
            another.ask("Still there?")


def test_a_refused_opening_opens_nothing(url: str) -> None:
    with pytest.raises(SessionError, match="is no picture") as caught:
        Session.open(url, image=b"\x00\x01")
    assert caught.value.code is ErrorCode.INVALID_ARG


@pytest.mark.parametrize("leave", ["break", "close", "with", "ask"])
def test_leaving_a_stream_cancels_its_turn(server: TritonServer, leave: str) -> None:
    with Session.open(server.grpc_url, image=PICTURE) as undisturbed:
        expected = undisturbed.ask(QUESTIONS[0], max_tokens=30)
    with Session.open(server.grpc_url, image=PICTURE) as session:
        stream = session.stream("Go on.", max_tokens=600, ignore_eos=True)
        if leave == "break":
            for _ in stream:
                break
        elif leave == "with":
            with stream:
                next(iter(stream))
        else:
            pieces = iter(stream)
            next(pieces)
            if leave == "close":
                stream.close()
        answer = session.ask(QUESTIONS[0], max_tokens=30)
        assert answer.text == expected.text
        # Had the turn run to its end, it would be part of the conversation.
        assert answer.num_input_tokens == expected.num_input_tokens
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.answer


def test_http_cannot_stream(server: TritonServer) -> None:
    with (
        Session.open(server.http_url) as session,
        pytest.raises(SessionError, match="grpc://host:port"),
    ):
        session.stream("Hello!")


def test_sessions_side_by_side(server: TritonServer) -> None:
    answers: list[list[str]] = []

    def talk(streamed: bool) -> None:
        with Session.open(server.grpc_url, image=PICTURE) as session:
            answers.append(
                ["".join(session.stream(question, max_tokens=30)) for question in QUESTIONS]
                if streamed
                else [session.ask(question, max_tokens=30).text for question in QUESTIONS]
            )

    threads = [threading.Thread(target=talk, args=[index % 2 == 0]) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_server(scheme: str) -> None:
    [port] = free_ports(1)
    with pytest.raises(SessionError, match=f"no server answers at 127.0.0.1:{port}") as caught:
        Session.open(f"{scheme}://127.0.0.1:{port}")
    assert caught.value.code is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize(
    "text",
    [
        "[500] Failed to process the request(s) for model 'llava', message: Stub process 'llava_0'"
        " is not healthy.",
        "[StatusCode.INTERNAL] Stub process is not healthy.",
        "[StatusCode.UNAVAILABLE] Socket closed",
        "Failed to obtain the health mutex.",
    ],
)
def test_a_model_that_died_is_a_server_that_is_lost(text: str) -> None:
    told = session_error(InferenceServerException(text), "localhost:8001")
    assert isinstance(told, LostConnectionError)
    assert told.code is ErrorCode.UNAVAILABLE


def test_errors_do_not_name_shared_memory() -> None:
    name = "llava-triton-server-a1_b2c3d-14e495b5-84eb-465b-968d-a1d64398cbd6"
    text = f"Failed to increase the shared memory pool size for key '/{name}' to 1 byte"
    for told in (
        session_error(InferenceServerException(text), "localhost:8001"),
        error_from_text(f"in ensemble 'llava', INTERNAL: {text}"),
        as_session_error(RuntimeError(text)),
    ):
        assert told.code is ErrorCode.INTERNAL
        assert "shared memory pool size" in str(told)
        assert "a1_b2c3d" not in str(told) + told.sentence


@pytest.mark.parametrize("url", ["localhost:8001", "ftp://localhost", "grpc://", ""])
def test_bad_urls(url: str) -> None:
    with pytest.raises(SessionError, match="give grpc://host:port or http://host:port"):
        Session.open(url)


def test_the_client_is_light() -> None:
    program = "import sys, llava_triton.client.grpc, llava_triton.client.http; print(*sys.modules)"
    done: Any = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "transformers", "PIL"} & set(loaded)
