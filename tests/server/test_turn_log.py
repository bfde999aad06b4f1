"""A line of JSON for each turn, switched on by the environment, through the real server."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from llava_triton.contract.settings import VARIABLE
from llava_triton.server.triton_server import TritonServer, free_ports
from llava_triton.serving.turn_log import session_hash
from tests.triton import Stream, whole

PICTURE = Path(__file__).resolve().parents[2] / "examples" / "pictures" / "five-shapes.png"


@pytest.fixture
def log(demo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server, and what its log has of turns so far."""
    monkeypatch.setenv(VARIABLE, json.dumps({"log_turns": True, "default_max_tokens": 3}))
    path = tmp_path / "log"
    with TritonServer(demo_repository, *free_ports(3), log=path) as server:

        def lines(count: int) -> list[dict[str, Any]]:
            deadline = time.monotonic() + 30.0
            while True:
                found = [
                    line for line in path.read_text().splitlines() if '"event": "turn"' in line
                ]
                if len(found) >= count:
                    return [json.loads(line) for line in found]
                assert time.monotonic() < deadline, found
                time.sleep(0.05)

        yield server, lines


def ask_nothing(server: TritonServer, session: str) -> None:
    """A ping, a look for a session, and the end of an answer that nobody is giving."""
    alone = {"sequence_start": True, "sequence_end": True}
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        client.infer("llava", [], sequence_id=uuid.uuid4().hex, **alone)
        with pytest.raises(InferenceServerException, match="INVALID_ARG"):
            client.infer("llava", [], sequence_id=session)
        stop = {"stop_answer": session}
        client.infer("llava", [], sequence_id=uuid.uuid4().hex, parameters=stop, **alone)


def test_every_turn_has_a_line_and_no_line_has_an_id(log: Any) -> None:
    server, lines = log
    session = uuid.uuid4().hex
    with Stream(server.grpc_address) as stream:
        first = whole(
            stream.turn(
                session=session, start=True, images=[PICTURE.read_bytes()], text="What is shown?"
            )
        )
        with pytest.raises(InferenceServerException):
            whole(stream.turn(session=session, text="?", parameters={"temperature": -1}))
        ask_nothing(server, session)
        whole(stream.turn(session=session, text="And what else?", end=True))
    opened, refused, closed = lines(3)  # and none of what asked nothing
    assert {line["session"] for line in (opened, refused, closed)} == {session_hash(session)}
    assert session not in json.dumps([opened, refused, closed])
    assert (opened["opens"], opened["closes"], opened["pictures"]) == (True, False, 1)
    # The environment's setting is the models' too.
    assert opened["output_tokens"] == first.num_output_tokens <= 3
    assert opened["input_tokens"] == first.num_input_tokens
    assert 0 < opened["first_token_ms"] <= opened["total_ms"]
    assert opened["outcome"] in ("stop", "length")
    assert opened["turn"]
    assert refused["outcome"] == "INVALID_ARG"
    assert "temperature" in refused["error"]
    assert closed["closes"]
    assert closed["cached_tokens"] > 0
