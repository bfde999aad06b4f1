"""The adapter in front of a server with little room: full, and sessions that expire."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llava_triton.server import TritonServer, free_ports
from tests.adapter_process import Adapter
from tests.conftest import ROOT
from tests.container_process import question

MAX_SESSIONS = 2
LIMITS = {"max_sessions": MAX_SESSIONS, "session_idle_seconds": 1.0}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapter]:
    folder = tmp_path_factory.mktemp("little room")
    repository, settings = folder / "repository", folder / "settings.json"
    settings.write_text(json.dumps(LIMITS))
    export = ["-m", "llava_export", "--model", str(ROOT / "demo" / "checkpoint")]
    export += ["--output", str(repository), "--settings", str(settings)]
    subprocess.run([sys.executable, *export], check=True, capture_output=True)
    with TritonServer(repository, *free_ports(3)) as server:
        adapter = Adapter(server, repository)
        try:
            adapter.wait_until(lambda: adapter.ping() == 200)
            yield adapter
        finally:
            adapter.stop()


def open_count(adapter: Adapter) -> float:
    return sum(adapter.metric(f'llava_sessions{{state="{each}"}}') for each in ("idle", "active"))


def test_sessions_expire_and_a_full_server_says_so(adapter: Adapter) -> None:
    adapter.wait_until(lambda: open_count(adapter) == 0)  # /ping's own have gone
    opened = [adapter.invoke({"requestType": "NEW_SESSION"}) for _ in range(MAX_SESSIONS)]
    assert [each.status for each in opened] == [200, 200], opened
    full = adapter.invoke({"requestType": "NEW_SESSION"})
    assert (full.status, full.code) == (503, "unavailable")
    assert int(full.headers["retry-after"]) > 0
    assert "all 2 sessions are in use" in full.json["error"]["message"]
    stateless = adapter.invoke({"messages": [{"role": "user", "content": "Hello!"}]})
    assert (stateless.status, stateless.code) == (503, "unavailable")
    assert adapter.ping() == 200  # full is alive
    adapter.wait_until(lambda: open_count(adapter) == MAX_SESSIONS)
    adapter.wait_until(lambda: open_count(adapter) == 0)  # nobody has used them
    for session in opened:
        expired = adapter.invoke(question("Hello!"), session.new_session)
        assert (expired.status, expired.code) == (400, "session_not_found")
    again = adapter.invoke({"requestType": "NEW_SESSION"})
    assert again.status == 200
    adapter.invoke({"requestType": "CLOSE"}, again.new_session)
