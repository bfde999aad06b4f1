"""Sessions that outlive the real server: killed, started again, resumed by their clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from llava_triton.client import AsyncSession, ErrorCode, Session, SessionError
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.conftest import ROOT
from tests.triton import ask

PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.*"))[:3]
QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "Which colors are there?",
    "Is it large?",
)
LIMIT: dict[str, Any] = {"max_tokens": 24}
MOST_SESSIONS = 3
PATIENCE_SECONDS = 60.0


class Server:
    """A server with a journal, which can be killed."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.folder = folder
        self._repository, self._ports = repository, free_ports(3)
        self._server = TritonServer(repository, *self._ports)
        self._server.start()

    @property
    def grpc_url(self) -> str:
        return self._server.grpc_url

    @property
    def http_url(self) -> str:
        return self._server.http_url

    @property
    def grpc_address(self) -> str:
        return self._server.grpc_address

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self._server.metrics_url) as response:
            text = response.read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def files(self) -> list[Path]:
        # Folders may vanish meanwhile, which `rglob` does not take.
        return [Path(place) / name for place, _, names in os.walk(self.folder) for name in names]

    def wait_until_written(self, records: int) -> None:
        """Until the journal has so many records."""
        wait_until(lambda: sum(path.parent.name == "records" for path in self.files()) == records)

    def kill(self) -> None:
        """As a machine that is lost; then another one, at the same address."""
        for process in (self._server.pid, *self._server.stubs()):
            os.kill(process, signal.SIGKILL)
        self.stop()
        self._server = TritonServer(self._repository, *self._ports)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(at_once=True)


def wait_until(holds: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lossy(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Room for three sessions, and a journal for all."""
    place = tmp_path_factory.mktemp("journal")
    repository, folder = place / "repository", place / "a journal"
    shutil.copytree(demo_repository, repository, symlinks=True)
    settings = {"max_sessions": MOST_SESSIONS, "journal": folder.as_uri()}
    (repository / "settings.json").write_text(json.dumps(settings))
    running = Server(repository, folder)
    yield running
    running.stop()


def hold(url: str, streamed: bool, before: dict[int, Callable[[], None]] | None = None) -> Any:
    """A conversation; before some of its questions something happens."""
    answers = []
    with Session.open(url, image=PICTURES[0]) as session:
        for index, question in enumerate(QUESTIONS):
            (before or {}).get(index, lambda: None)()
            image = PICTURES[1] if index == 2 else None
            if streamed:
                answers.append("".join(session.stream(question, image, **LIMIT)))
            else:
                answers.append(session.ask(question, image, **LIMIT).text)
        session.rewind(3)
        answers.append(session.ask("And now?", **LIMIT).text)
    return answers


@pytest.mark.parametrize("way", ["grpc", "http", "grpc stream"])
def test_a_client_goes_on_when_its_server_was_killed(
    lossy: Server, server: TritonServer, way: str
) -> None:
    streamed = way == "grpc stream"
    expected = hold(server.http_url if way == "http" else server.grpc_url, streamed)
    resumed = lossy.metric("llava_sessions_resumed_total")

    def lose(records: int) -> Callable[[], None]:
        def kill() -> None:
            lossy.wait_until_written(records)
            lossy.kill()

        return kill

    url = lossy.http_url if way == "http" else lossy.grpc_url
    # One record for the opening, and one for each question.
    assert hold(url, streamed, {1: lose(2), 3: lose(4)}) == expected
    wait_until(lambda: lossy.metric("llava_sessions_resumed_total") >= 1)
    assert resumed >= 0
    wait_until(lambda: not lossy.files())  # its end deletes all that was written of it


def test_asyncio_clients_and_those_of_another_process_go_on(lossy: Server) -> None:
    async def begin() -> str:
        session = await AsyncSession.open(lossy.grpc_url, image=PICTURES[2], tenant="alice")
        await session.ask(QUESTIONS[0], **LIMIT)
        return str(session.id)

    async def go_on(session_id: str) -> tuple[str, str]:
        opened = await AsyncSession.open(lossy.grpc_url, resume=session_id, tenant="alice")
        async with opened as session:
            first = (await session.ask(QUESTIONS[1], **LIMIT)).text
            lossy.wait_until_written(3)
            lossy.kill()
            fork = await session.fork()
            pieces = [piece async for piece in session.stream(QUESTIONS[2], **LIMIT)]
            await fork.close()
        return first, "".join(pieces)

    session_id = asyncio.run(begin())
    lossy.wait_until_written(2)
    lossy.kill()
    for tenant in (None, "bob"):
        with pytest.raises(SessionError) as caught:
            Session.open(lossy.grpc_url, resume=session_id, tenant=tenant)
        assert caught.value.code is ErrorCode.NOT_FOUND
    resumed = asyncio.run(go_on(session_id))
    with Session.open(lossy.grpc_url, image=PICTURES[2]) as session:
        session.ask(QUESTIONS[0], **LIMIT)
        assert resumed == tuple(session.ask(each, **LIMIT).text for each in QUESTIONS[1:3])
    wait_until(lambda: not lossy.files())


def test_what_was_never_there_is_not_found(lossy: Server, server: TritonServer) -> None:
    for url in (lossy.grpc_url, lossy.http_url, server.grpc_url):
        with pytest.raises(SessionError, match="unknown or has expired") as caught:
            Session.open(url, resume="nobody's")
        assert caught.value.code is ErrorCode.NOT_FOUND


def test_more_sessions_are_open_than_fit_into_memory(lossy: Server, server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURES[0]) as session:
        first, second = (session.ask(each, **LIMIT).text for each in QUESTIONS[:2])
    sessions = [Session.open(lossy.grpc_url, image=PICTURES[0]) for _ in range(3 * MOST_SESSIONS)]
    for each in sessions:
        assert each.ask(QUESTIONS[0], **LIMIT).text == first
    for each in sessions[::-1]:
        assert each.ask(QUESTIONS[1], **LIMIT).text == second
    wait_until(lambda: lossy.metric("llava_sessions_hibernated_total") > 2 * MOST_SESSIONS)
    # Triton has let go of those that hibernate: its batcher knows no more of them.
    with tritonclient.grpc.InferenceServerClient(lossy.grpc_address) as client:
        wait_until(lambda: _is_unknown(client, sessions[-1].id))
    for each in sessions:
        each.close()
    wait_until(lambda: not lossy.files())


def _is_unknown(client: Any, session_id: int | str) -> bool:
    try:
        ask(client, session=session_id, parameters={"max_tokens": 1})
    except InferenceServerException as error:
        return "must specify the START flag" in str(error)
    return False
