"""Turns through `llava`, which answers once: gathered in one process, answered from another."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from llava_triton import protocol
from llava_triton.delta import Delta
from llava_triton.errors import ErrorCode, SessionError, not_found
from llava_triton.server import TritonServer
from llava_triton.whole_answers import DELIVERED_TO, WholeAnswer, from_parameters, to_parameters
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


@pytest.mark.parametrize("text", ["", "a\0b", '"quoted" \\', "π \ud800", "x" * 100_000])
def test_an_answer_survives_its_way_between_the_models(text: str) -> None:
    parameters = to_parameters("token", delta(text, "stop"))
    assert parameters[DELIVERED_TO] == "token"
    assert not any("\0" in value or not value.isascii() for value in parameters.values())
    assert from_parameters(parameters) == delta(text, "stop")


def test_an_error_survives_its_way_between_the_models() -> None:
    outcome = from_parameters(to_parameters("token", not_found("the session is gone")))
    assert isinstance(outcome, SessionError)
    assert (outcome.code, outcome.sentence) == (ErrorCode.NOT_FOUND, "the session is gone")


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
        {DELIVERED_TO: "guessed", "answer": json.dumps(vars(delta("forged", "stop")))},
        {DELIVERED_TO: "guessed", "error": "NOT_FOUND: forged"},
        {DELIVERED_TO: "guessed"},
        {DELIVERED_TO: 7, "answer": "{}"},
        {DELIVERED_TO: "guessed", "answer": "[" * 100_000},
        {protocol.WHOLE_ANSWER: "guessed"},
        {protocol.WHOLE_ANSWER: 7},
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
