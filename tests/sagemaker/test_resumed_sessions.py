"""Sessions that go on from the journal, whatever dies: real containers with one journal."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llava_triton.client import Session
from llava_triton.server.triton_server import TritonServer
from tests.conftest import ROOT
from tests.container_process import PATIENCE_SECONDS, Answer, Container, question, text_of

PICTURE = (ROOT / "examples" / "pictures" / "five-shapes.png").read_bytes()
QUESTIONS = ("How many shapes are there?", "Describe the picture.", "Is there a circle?")

Start = Callable[[int], Container]


@pytest.fixture
def journaled(demo_repository: Path, tmp_path: Path) -> Path:
    """The demo repository, with a journal in which every answer is safe before it is told."""
    repository = tmp_path / "journaled"
    shutil.copytree(demo_repository, repository, symlinks=True)
    settings = json.loads((repository / "settings.json").read_text())
    settings |= {"journal": (tmp_path / "journal").as_uri(), "journal_sync": True}
    (repository / "settings.json").write_text(json.dumps(settings))
    return repository


@pytest.fixture
def start(journaled: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts containers of so many engines on that repository."""
    started: list[Container] = []

    def make(engines: int) -> Container:
        log = tmp_path / f"log {len(started)}"
        before = ["env", f"LLAVA_ENGINES={engines}", "LLAVA_RESTARTS=10"]
        started.append(Container(journaled, log, before=before))
        return started[-1]

    yield make
    for container in started:
        container.stop()


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> list[str]:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        return [session.ask(text).text for text in QUESTIONS]


def open_session(container: Container) -> str:
    opened = container.invoke(PICTURE, "NEW_SESSION", "image/png")
    assert opened.status == 200, opened.body
    return opened.new_session


def answered(container: Container, session: str, text: str) -> Answer:
    """An answer, where need be only when something serves again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            answer = container.invoke(question(text), session)
        except OSError:
            answer = None
        if answer is not None and answer.status != 503:
            return answer
        assert time.monotonic() < deadline, container.output
        time.sleep(0.1)


def test_a_session_outlives_its_engine_and_its_machine(start: Start, expected: list[str]) -> None:
    first = start(2)
    first.wait_until_ready()
    session = open_session(first)
    told = [text_of(answered(first, session, QUESTIONS[0]))]
    for model in first.descendants("/language_model/"):
        model.kill()  # of both engines
    told.append(text_of(answered(first, session, QUESTIONS[1])))
    first.process.kill()
    second = start(1)
    second.wait_until_ready()
    told.append(text_of(answered(second, session, QUESTIONS[2])))
    assert told == expected
    assert second.invoke({"requestType": "CLOSE"}, session).status == 200
    gone = second.invoke(question("And now?"), session)
    assert (gone.status, gone.code) == (400, "session_not_found")


def test_an_instance_that_was_stopped_loses_its_session(start: Start, expected: list[str]) -> None:
    first, second = start(1), start(1)
    for container in (first, second):
        container.wait_until_ready()
    session = open_session(first)
    told = [text_of(answered(first, session, QUESTIONS[0]))]
    everything = [psutil.Process(first.process.pid), *first.descendants()]
    for process in everything:
        process.send_signal(signal.SIGSTOP)
    try:
        told.append(text_of(answered(second, session, QUESTIONS[1])))
    finally:
        for process in everything:
            process.send_signal(signal.SIGCONT)
    late = first.invoke(question("Which colours are there?"), session)
    assert late.status == 503, late.body
    # There is one history, and the late question is not in it: for both.
    told.append(text_of(answered(first, session, QUESTIONS[2])))
    assert told == expected
