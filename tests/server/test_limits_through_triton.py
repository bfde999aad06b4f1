"""Who decides when a session is over, and when there is room for one: the engine, not Triton."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from llava_triton.client import ErrorCode, Session, SessionError
from llava_triton.client.transport import TurnMessage
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.conftest import ROOT
from tests.triton import Stream, ask, whole

IDLE_SECONDS = 0.2
"""Less than a fast machine takes for `LONG`."""
PICTURE = (ROOT / "examples" / "pictures" / "wide.jpg").read_bytes()
SMALL = (ROOT / "examples" / "pictures" / "dark.png").read_bytes()
"""Five of these are fewer bytes than three of those."""
MOST_IMAGES = 4
LONG = {"max_tokens": 900, "ignore_eos": True}
SHORT = {"max_tokens": 2, "ignore_eos": True}
PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def narrow(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server with room for one session, which soon expires."""
    repository = tmp_path_factory.mktemp("narrow") / "repository"
    shutil.copytree(demo_repository, repository, symlinks=True)
    limits = {
        "session_idle_seconds": IDLE_SECONDS,
        "max_sessions": 1,
        "max_images_per_turn": MOST_IMAGES,
        "max_images_bytes_per_turn": 3 * len(PICTURE),
    }
    (repository / "settings.json").write_text(json.dumps(limits))
    with TritonServer(repository, *free_ports(3)) as server:
        yield server


@pytest.fixture
def client(narrow: TritonServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(narrow.grpc_address) as connected:
        yield connected


def metric(server: TritonServer, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url) as response:
        found = re.search(rf"^{re.escape(name)} (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def outlives_its_idle_limit(narrow: TritonServer) -> bool:
    """Whether a session goes on after an answer that took longer than a session may be idle."""
    with Stream(narrow.grpc_address) as stream:
        began = time.monotonic()
        first = whole(stream.turn("Tell me.", session="long", start=True, parameters=LONG))
        took = time.monotonic() - began
        try:
            again = whole(stream.turn("And now?", session="long", end=True, parameters=SHORT))
        except InferenceServerException:
            return False
    assert took > IDLE_SECONDS, "the answer was too short to show anything; make it longer"
    return again.num_input_tokens > first.num_input_tokens + first.num_output_tokens


def test_an_answer_longer_than_the_idle_limit_ends_no_session(narrow: TritonServer) -> None:
    # On a busy machine the question after it may come too late: again, then.
    assert any(outlives_its_idle_limit(narrow) for _ in range(5))


def test_triton_lets_an_expired_session_go(
    narrow: TritonServer, client: tritonclient.grpc.InferenceServerClient
) -> None:
    ask(client, "Hello?", session="left", start=True, parameters=SHORT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    said = ""
    while "must specify the START flag" not in said:  # Triton's own words, as a stream has them
        assert time.monotonic() < deadline, said
        time.sleep(IDLE_SECONDS + 1.5)  # asked before, the session would live on
        with Stream(narrow.grpc_address) as stream:
            try:
                whole(stream.turn("Still there?", session="left", parameters=SHORT))
            except InferenceServerException as error:
                said = str(error)


def test_where_there_is_no_room_no_picture_is_decoded(
    narrow: TritonServer, client: tritonclient.grpc.InferenceServerClient
) -> None:
    misses = 'llava_image_cache_total{result="miss"}'
    picture = (Path(__file__).parents[2] / "examples/pictures/tall.webp").read_bytes()
    with Stream(narrow.grpc_address) as stream:
        assert next(stream.turn("Tell me.", session="only", start=True, parameters=LONG)).text
        before = metric(narrow, misses)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE: all 1 sessions"):
            ask(client, "And this?", session="one more", images=[picture], start=True)
        # The one that has it may show it, and is counted: so the metric would have told.
        stream.cancel()
    ask(
        client,
        "What is it?",
        session="only",
        images=[picture],
        start=True,
        end=True,
        parameters=SHORT,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while metric(narrow, misses) == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert metric(narrow, misses) == before + 1


def test_thousands_of_turns_at_once_break_nothing(server: TritonServer) -> None:
    """That many corrupted Triton's heap before (benchmarks/payload_backlog.py)."""
    flood, rounds = 2500, 3
    inputs = TurnMessage("flood", text="Hello", sampling={"max_tokens": 1}).inputs(
        tritonclient.grpc
    )
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        for number in range(rounds):
            over = threading.Semaphore(0)
            for _ in range(flood):
                client.async_infer(
                    "llava",
                    inputs,
                    lambda result, error, over=over: over.release(),
                    sequence_id=f"flood-{number}",
                    sequence_start=True,
                    sequence_end=True,
                )
            for _ in range(flood):
                assert over.acquire(timeout=PATIENCE_SECONDS), "a turn was not answered"
            assert ask(client, "Hi", session="calm", start=True, parameters=SHORT).finish_reason
            with Stream(server.grpc_address) as stream:
                assert whole(stream.turn("Hi?", session="calm", end=True, parameters=SHORT))
    assert server.fault() is None


@pytest.mark.parametrize(
    ("picture", "count", "said"),
    [
        (SMALL, MOST_IMAGES + 1, r"5 pictures: .* a turn takes at most 4"),
        (PICTURE, MOST_IMAGES, rf"{4 * len(PICTURE)} bytes together; the limit is \d+"),
    ],
    ids=["too many pictures", "too many bytes"],
)
def test_a_conversation_that_fits_no_request_says_so(
    narrow: TritonServer, picture: bytes, count: int, said: str
) -> None:
    def talk() -> None:
        with Session.open(narrow.grpc_url, image=picture, replay=True) as session:
            for _ in range(count - 1):
                session.ask("And?", image=picture, max_tokens=1)
            with Session.open(narrow.grpc_url, session_id=session.id):
                pass  # its end ends also ours
            session.ask("And?", max_tokens=1)

    # It may be lost and opened again earlier, too: so short is its idle limit.
    with pytest.raises(SessionError, match=said) as caught:
        talk()
    assert caught.value.code is ErrorCode.INVALID_ARG


def test_more_bytes_of_pictures_than_a_turn_takes(
    client: tritonclient.grpc.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException, match=r"image holds 4 pictures of .* together"):
        ask(client, "?", session="s", images=[PICTURE] * 4, start=True, end=True)
