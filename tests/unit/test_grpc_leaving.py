"""A stream over gRPC that is left, by Ctrl-C for one, before anything of its answer has come."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import tritonclient.grpc

from llava_triton.client.grpc import BEGIN_SECONDS, GrpcTransport
from llava_triton.client.transport import TurnMessage


class Left:
    """In the place of tritonclient and of the queue that it fills: tells what is called."""

    def __init__(self, answers: bool) -> None:
        self.calls: list[str] = []
        self._answers = answers

    def start_stream(self, _: Any) -> None:
        self.calls.append("start")

    def async_stream_infer(self, *_: Any, **__: Any) -> None:
        self.calls.append("send")

    def get(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise KeyboardInterrupt
        assert timeout == BEGIN_SECONDS
        self.calls.append("wait")
        if not self._answers:
            raise queue.Empty
        return None, None

    def stop_stream(self, **_: Any) -> None:
        self.calls.append("cancel")


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_a_turn_is_cancelled_when_it_has_begun(
    monkeypatch: pytest.MonkeyPatch, answers: bool, start: bool
) -> None:
    left = Left(answers)
    monkeypatch.setattr(tritonclient.grpc, "InferenceServerClient", lambda *_, **__: left)
    transport = GrpcTransport("localhost:1")
    monkeypatch.setattr("llava_triton.client.grpc.queue.SimpleQueue", lambda: left)
    with pytest.raises(KeyboardInterrupt):
        next(transport.stream(TurnMessage("s", start=start, text="What?")))
    # One that opens its session has none to lose.
    waits = [] if start else ["wait"]
    assert left.calls == ["start", "send", *waits, "cancel"]
