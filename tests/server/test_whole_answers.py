"""Turns through `llava`, which answers once: gathered in one process, answered from another."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from llava_triton.contract import protocol
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError, not_found
from llava_triton.contract.models import IMAGE
from llava_triton.server.triton_server import TritonServer
from llava_triton.serving.whole_answers import Inbox, Outbox, Outcome, WholeAnswer
from tests.triton import Stream, ask, whole

PLACES = 32
"""What Triton's Python backend has for one model's calls: once, as many waiting turns were all."""
LONG = {"max_tokens": 3000, "ignore_eos": True}
SHORT = {"max_tokens": 2, "ignore_eos": True}


def delta(text: str, finish_reason: Any = "") -> Delta:
    return Delta(text, finish_reason, 7, 3, 5, 1.5)


def test_pieces_are_gathered_and_told_once() -> None:
    told: list[Delta | SessionError] = []
    answer = WholeAnswer(told.append)
    for event in (delta("A red "), delta(""), delta("circle."), delta("", "stop")):
        answer(event)
    assert told == [delta("A red circle.", "stop")]


def test_an_error_is_told_instead_of_the_pieces_before_it() -> None:
    told: list[Delta | SessionError] = []
    answer = WholeAnswer(told.append)
    error = not_found("gone")
    answer(delta("A red "))
    answer(error)
    assert told == [error]


class Arrivals:
    """An inbox, an outbox, and what has arrived."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
        self.inbox = Inbox(lambda number, outcome: self._arrived.put((number, outcome)))
        self.outbox = Outbox()

    def next(self) -> tuple[str, Outcome]:
        return self._arrived.get(timeout=20.0)


@pytest.fixture
def arrivals() -> Iterator[Arrivals]:
    both = Arrivals()
    yield both
    both.outbox.close()
    both.inbox.close()


@pytest.mark.parametrize("text", ["", "a\0b", '"quoted" \\', "π \ud800", "x" * 1_000_000])
def test_an_answer_survives_its_way_between_the_models(arrivals: Arrivals, text: str) -> None:
    arrivals.outbox.send(arrivals.inbox.token("7"), delta(text, "stop"))
    assert arrivals.next() == ("7", delta(text, "stop"))


def test_an_error_survives_its_way_between_the_models(arrivals: Arrivals) -> None:
    error = SessionError(ErrorCode.INVALID_ARG, "the picture is none", IMAGE.name)
    arrivals.outbox.send(arrivals.inbox.token("7"), error)
    number, outcome = arrivals.next()
    assert isinstance(outcome, SessionError)
    assert (number, outcome.code, outcome.sentence, outcome.subject) == (
        "7",
        ErrorCode.INVALID_ARG,
        "the picture is none",
        "image",
    )


@pytest.mark.parametrize(
    "token", ["", "7", "guessed/7", "/", "x" * 1000 + "/7", "a\0b/7", "\ud800/7"]
)
def test_an_answer_that_nobody_waits_for_delays_no_other(
    arrivals: Arrivals, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    arrivals.outbox.send(token, delta("forged", "stop"))
    arrivals.outbox.send(arrivals.inbox.token("8"), delta("A circle.", "stop"))
    assert arrivals.next() == ("8", delta("A circle.", "stop"))
    assert "was not delivered" in caplog.text


def test_answers_arrive_in_order_and_an_inbox_that_is_gone_is_told_of(
    arrivals: Arrivals, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        arrivals.outbox.send(arrivals.inbox.token(str(number)), delta("", "stop"))
    assert [arrivals.next()[0] for _ in range(100)] == [str(number) for number in range(100)]
    gone = Inbox(lambda *_: None)
    gone.close()
    arrivals.outbox.send(gone.token("1"), delta("", "stop"))
    arrivals.outbox.send(arrivals.inbox.token("last"), delta("", "stop"))
    assert arrivals.next()[0] == "last"
    assert "was not delivered" in caplog.text


def test_nobody_of_another_user_is_heard(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    arrivals.outbox.send(arrivals.inbox.token("1"), delta("", "stop"))
    arrivals.outbox.close()
    assert "another user" in caplog.text


def others_are_answered_first(server: TritonServer) -> bool:
    """Whether a session gets its answers while more turns than there are places wait behind the
    long answers of two other sessions."""
    with (
        Stream(server.grpc_address) as first,
        Stream(server.grpc_address) as second,
        tritonclient.grpc.InferenceServerClient(server.grpc_address) as client,
        ThreadPoolExecutor(PLACES + 2) as threads,
    ):
        streams = {"busy": first, "busier": second}
        for session, stream in streams.items():
            whole(stream.turn("Hello?", session=session, start=True, parameters=SHORT))
            assert not next(stream.turn("Tell me.", session=session, parameters=LONG)).finish_reason

        def wait_behind(number: int) -> str:
            session = list(streams)[number % len(streams)]
            return ask(client, f"{number}?", session=session, parameters=SHORT).finish_reason

        waiting = [threads.submit(wait_behind, number) for number in range(PLACES + 2)]
        ask(client, "And you?", session="other", parameters=SHORT, start=True)
        ask(client, "And now?", session="other", parameters=SHORT, end=True)
        first_ones = not any(turn.done() for turn in waiting)
        for stream in streams.values():
            stream.cancel()  # those behind it go on
        for session in streams:
            ask(client, session=session, end=True)
        return first_ones


def test_waiting_turns_keep_nobody_elses_waiting(server: TritonServer) -> None:
    # On a busy machine the long answers, of some seconds, may be over too early: again, then.
    assert any(others_are_answered_first(server) for _ in range(5))


@pytest.mark.parametrize(
    "parameters",
    [
        {protocol.WHOLE_ANSWER: "guessed"},
        {protocol.WHOLE_ANSWER: "guessed/guessed"},
        {protocol.WHOLE_ANSWER: 7},
        {protocol.MARK: True},
    ],
    ids=str,
)
def test_what_the_models_tell_one_another_cannot_be_forged(
    grpc_client: tritonclient.grpc.InferenceServerClient, parameters: dict[str, Any]
) -> None:
    """A client's own request with such parameters may fail; others hear nothing of it."""
    assert ask(grpc_client, "Who?", session="honest", start=True, parameters=SHORT).text
    text = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"Now?"], dtype=np.object_))
    for model in ("llava", "answer_collector"):
        answered = threading.Event()
        grpc_client.async_infer(  # fails, or is a turn like any other
            model,
            [text],
            callback=lambda result, error, told=answered: told.set(),
            sequence_id="forger",
            sequence_start=True,
            sequence_end=True,
            parameters=parameters,
        )
        assert answered.wait(60.0)
    assert ask(grpc_client, "And?", session="honest", end=True, parameters=SHORT).text
