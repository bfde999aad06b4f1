"""Sessions that outlive the real server: killed, started again, resumed by their clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from llava_triton.client import AsyncSession, ErrorCode, Session, SessionError
from llava_triton.client.transport import LostConnectionError
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.conftest import ROOT
from tests.triton import ask
from tests.waiting import wait_until

PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.*"))[:3]
QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "Which colors are there?",
    "Is it large?",
)
LIMIT: dict[str, Any] = {"max_tokens": 24}
MOST_SESSIONS = 3


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
            with suppress(ProcessLookupError):  # models may end as soon as their Triton has
                os.kill(process, signal.SIGKILL)
        self.stop()
        self._server = TritonServer(self._repository, *self._ports)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(at_once=True)


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


def patiently(ask_it: Callable[..., str], *turn: Any) -> str:
    """Ask, and once more where the connection turns out to be broken: whether the turn has reached
    its server nobody knows then, so no client does that by itself."""
    try:
        return ask_it(*turn)
    except LostConnectionError:
        return ask_it(*turn)


def talks(lossy: Server, runner: asyncio.Runner) -> dict[str, tuple[Any, Callable[..., str]]]:
    """A session of each kind of client, and how it asks."""

    def asks(session: Session) -> Callable[..., str]:
        return lambda *turn: session.ask(*turn, **LIMIT).text

    def streams(session: Session) -> Callable[..., str]:
        return lambda *turn: "".join(session.stream(*turn, **LIMIT))

    def awaits(session: AsyncSession) -> Callable[..., str]:
        return lambda *turn: runner.run(session.ask(*turn, **LIMIT)).text

    async def gathered(session: AsyncSession, *turn: Any) -> str:
        return "".join([piece async for piece in session.stream(*turn, **LIMIT)])

    picture = PICTURES[0]
    whole, over_http = (Session.open(url, picture) for url in (lossy.grpc_url, lossy.http_url))
    streamed = Session.open(lossy.grpc_url, picture)
    alices = runner.run(AsyncSession.open(lossy.http_url, picture, tenant="alice"))
    pieces = runner.run(AsyncSession.open(lossy.grpc_url, picture))
    return {
        "grpc": (whole, asks(whole)),
        "http": (over_http, asks(over_http)),
        "grpc stream": (streamed, streams(streamed)),
        "asyncio, http": (alices, awaits(alices)),
        "asyncio, grpc stream": (pieces, lambda *turn: runner.run(gathered(pieces, *turn))),
    }


def test_clients_go_on_when_their_server_was_killed(lossy: Server, server: TritonServer) -> None:
    with Session.open(server.grpc_url, PICTURES[0]) as session:
        turns = [(each,) for each in QUESTIONS]
        turns[2] = (QUESTIONS[2], PICTURES[1])  # type: ignore[assignment]
        expected = [session.ask(*turn, **LIMIT).text for turn in turns]
        session.rewind(3)
        expected_again = session.ask("And now?", **LIMIT).text
    with asyncio.Runner() as runner:
        open_now = talks(lossy, runner)
        for index, turn in enumerate(turns):
            if index in (1, 3):
                # A record for each opening, and one for each question.
                lossy.wait_until_written(len(open_now) * (1 + index))
                lossy.kill()
            for way, (_, ask_it) in open_now.items():
                assert patiently(ask_it, *turn) == expected[index], (way, index)
        alices = open_now["asyncio, http"][0]
        for tenant in (None, "bob"):
            with pytest.raises(SessionError) as caught:
                Session.open(lossy.grpc_url, resume=alices.id, tenant=tenant)
            assert caught.value.code is ErrorCode.NOT_FOUND
        # Another process goes on by the ID alone.
        with Session.open(lossy.grpc_url, resume=alices.id, tenant="alice") as alice:
            alice.rewind(3)
            assert alice.ask("And now?", **LIMIT).text == expected_again
        # What a client asks of a session besides turns brings it back, too: there is room for
        # three.
        fork = open_now["grpc"][0].fork()
        open_now["http"][0].rewind(3)
        assert open_now["http"][1]("And now?") == expected_again
        fork.rewind(3)
        assert fork.ask("And now?", **LIMIT).text == expected_again
        fork.close()
        for session, _ in open_now.values():
            closing = session.close()
            if closing is not None:
                runner.run(closing)
    wait_until(lambda: lossy.metric("llava_sessions_resumed_total") > 0)
    wait_until(lambda: not lossy.files())  # their end deletes all that was written of them


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
        # The engine's own words name the session.
        return "NOT_FOUND: the session is unknown" in str(error)
    return False
