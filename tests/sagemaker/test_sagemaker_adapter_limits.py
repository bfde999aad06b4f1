"""The adapter in front of a server with little room: full, and sessions that expire."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from llava_sagemaker.adapter.request_reading import LARGEST_BODIES

from llava_triton.server.triton_server import TritonServer, free_ports
from tests.adapter_process import PATIENCE_SECONDS, Adapter
from tests.conftest import ROOT
from tests.container_process import question

MAX_SESSIONS = 2
LIMITS = {
    "max_sessions": MAX_SESSIONS,
    "session_idle_seconds": 1.0,
    "max_image_bytes": 600_000,
    "max_video_bytes": 600_000,
}
LARGEST_BODY = 600_000 * 4 // 3 + 2 * 256 * 1024


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapter]:
    folder = tmp_path_factory.mktemp("little room")
    repository, settings = folder / "repository", folder / "settings.json"
    settings.write_text(json.dumps(LIMITS))
    export = ["-m", "llava_export", "--model", str(ROOT / "demo" / "checkpoint")]
    export += ["--output", str(repository), "--settings", str(settings)]
    subprocess.run([sys.executable, *export], check=True, capture_output=True)
    with TritonServer(repository, *free_ports(3)) as server:
        with pytest.MonkeyPatch.context() as environment:
            # A proxy is of no use on the way to Triton.
            environment.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
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
    adapter.wait_until(lambda: adapter.ping() == 200)  # full is alive
    adapter.wait_until(lambda: open_count(adapter) == MAX_SESSIONS)
    adapter.wait_until(lambda: open_count(adapter) == 0)  # nobody has used them
    for session in opened:
        expired = adapter.invoke(question("Hello!"), session.new_session)
        assert (expired.status, expired.code) == (400, "session_not_found")
    again = adapter.invoke({"requestType": "NEW_SESSION"})
    assert again.status == 200
    adapter.invoke({"requestType": "CLOSE"}, again.new_session)


def test_idle_connections_shut_nobody_out(adapter: Adapter) -> None:
    with contextlib.ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(min(1100, hard - 500)):
            stack.enter_context(socket.create_connection(("127.0.0.1", adapter.port)))
        adapter.wait_until(lambda: adapter.ping() == 200)
    adapter.wait_until(lambda: adapter.ping() == 200)


def test_headers_have_a_size_limit(adapter: Adapter) -> None:
    with socket.create_connection(("127.0.0.1", adapter.port), timeout=60.0) as connection:
        connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nX-Long: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                connection.sendall(b"a" * 65_536)
                sent += 65_536
    # What the sockets' own buffers take is not seen.
    assert sent < 64 << 20, "headers of 64 MiB were taken"
    adapter.wait_until(lambda: adapter.ping() == 200)


def test_bodies_have_a_limit_together(adapter: Adapter) -> None:
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGEST_BODY}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        # All but the last byte: they are read, and wait for it.
        waiting = []
        for _ in range(LARGEST_BODIES + 1):
            connection = socket.create_connection(("127.0.0.1", adapter.port))
            waiting.append(stack.enter_context(connection))
            connection.sendall(head.encode() + b" " * (LARGEST_BODY - 1))
        (refused, *more), _, _ = select.select(waiting, [], [], PATIENCE_SECONDS)
        assert not more
        answer = http.client.HTTPResponse(refused)
        answer.begin()
        assert answer.status == 503
        assert b"too many large bodies are under way" in answer.read()
        adapter.wait_until(lambda: adapter.ping() == 200)
        small = adapter.invoke(b"small")
        assert (small.status, small.code) == (400, "invalid_request")  # it is no JSON
    large = b" " * LARGEST_BODY
    adapter.wait_until(lambda: adapter.invoke(large).status == 400)
