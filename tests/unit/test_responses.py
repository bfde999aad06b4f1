"""Pieces of answers on their way to Triton: few under load, the first and the last at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError, unavailable
from llava_triton.serving.response_thread import LONGEST_HOLD_SECONDS, ResponseThread


class Recorder:
    """A stream that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[Delta | SessionError] = []
        self.times: list[float] = []
        self.ended = threading.Event()
        self.broken = False
        self.given_up = False

    def send(self, event: Delta | SessionError) -> None:
        if self.broken:
            raise RuntimeError("no room in shared memory")
        self.events.append(event)
        self.times.append(time.monotonic())
        if isinstance(event, SessionError) or event.is_final:
            self.ended.set()

    def give_up(self) -> None:
        self.given_up = True
        self.ended.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))


def piece(text: str, tokens: int, reason: str = "") -> Delta:
    return Delta(text, reason, 5, tokens, 0, 1.0)  # type: ignore[arg-type]


def wait_for_events(stream: Recorder, count: int) -> None:
    deadline = time.monotonic() + 10.0
    while len(stream.events) < count:
        assert time.monotonic() < deadline, stream.events
        time.sleep(0.001)


@pytest.fixture
def responses() -> Iterator[ResponseThread]:
    thread = ResponseThread()
    yield thread
    thread.stop()


def test_every_token_of_a_lone_stream_is_sent_at_once(responses: ResponseThread) -> None:
    stream = Recorder()
    for number in range(1, 6):
        responses.put(stream, piece(f"{number} ", number))
        wait_for_events(stream, number)
    responses.put(stream, piece("end", 6, "stop"))
    assert stream.ended.wait(10)
    assert stream.text == "1 2 3 4 5 end"
    assert len(stream.events) == 6


def test_many_streams_share_responses_and_lose_nothing(responses: ResponseThread) -> None:
    streams = [Recorder() for _ in range(200)]
    tokens = 40
    began = time.monotonic()
    for number in range(1, tokens + 1):
        for stream in streams:
            responses.put(stream, piece(f"{number} ", number, "length" if number == tokens else ""))
    for stream in streams:
        assert stream.ended.wait(10)
        assert stream.text == "".join(f"{number} " for number in range(1, tokens + 1))
        first, last = stream.events[0], stream.events[-1]
        assert isinstance(first, Delta)
        assert first.num_output_tokens == 1  # never held back
        assert isinstance(last, Delta)
        assert (last.num_output_tokens, last.finish_reason) == (tokens, "length")
    held = (time.monotonic() - began) / LONGEST_HOLD_SECONDS
    assert sum(len(stream.events) for stream in streams) < len(streams) * min(tokens, held + 3)


def test_no_piece_is_held_for_long(responses: ResponseThread) -> None:
    crowd = [Recorder() for _ in range(500)]
    for stream in crowd:
        responses.put(stream, piece("first", 1))
    stream = crowd[0]
    responses.put(stream, piece("second", 2))
    wait_for_events(stream, 2)
    # The machine may be busy: what is looked at is that it comes without anything put after it.
    assert stream.text == "firstsecond"
    assert LONGEST_HOLD_SECONDS <= 0.05


def test_an_error_follows_what_was_held(responses: ResponseThread) -> None:
    stream = Recorder()
    responses.put(stream, piece("a", 1))
    responses.put(stream, piece("b", 2))
    responses.put(stream, unavailable("over"))
    assert stream.ended.wait(10)
    assert stream.text == "ab"
    assert isinstance(stream.events[-1], SessionError)


def test_a_stream_that_cannot_be_sent_to_is_given_up(responses: ResponseThread) -> None:
    broken, whole = Recorder(), Recorder()
    broken.broken = True
    responses.put(broken, piece("a", 1))
    responses.put(whole, piece("a", 1, "stop"))
    assert whole.ended.wait(10)
    assert broken.given_up
    assert whole.text == "a"


def test_stopping_sends_what_is_held() -> None:
    thread = ResponseThread()
    stream = Recorder()
    thread.put(stream, piece("a", 1))
    thread.put(stream, piece("b", 2))
    thread.stop()
    assert stream.text == "ab"
