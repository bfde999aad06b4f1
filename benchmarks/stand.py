"""What a load suite stands in front of: a server and the session adapter before it."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from email.message import Message
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.doors import doors_of
from benchmarks.process_watch import ProcessWatch
from llava_triton.server.triton_server import TritonServer, free_ports

START_SECONDS = 60.0


class Stand:
    """Both, on ports that stay the same when they are started anew.

    Args:
        repository: an exported one.
        log: for the server's output; the adapter's goes beside it.
    """

    def __init__(self, repository: Path, log: Path) -> None:
        self.repository = repository
        self.log = log
        self._ports = free_ports(4)
        self._running = ExitStack()

    def start(self) -> None:
        """Start both."""
        *ports, self.adapter_port = self._ports
        server = TritonServer(self.repository, *ports, log=self.log)
        self.server = self._running.enter_context(server)
        log = self._running.enter_context(self.log.with_suffix(".adapter.log").open("ab"))
        before = adapter(
            server.grpc_address,
            self.repository,
            metrics_port=server.ports["metrics"],
            port=self.adapter_port,
            log=log,
        )
        running = self._running.enter_context(before)
        self.watch = ProcessWatch(server.pid, running.pid)
        self.doors = doors_of(server, self.adapter_port)

    def stop(self) -> None:
        """Stop both."""
        self._running.close()

    def restart(self) -> None:
        """Whatever has become of them: both anew."""
        self.stop()
        self.start()

    def __enter__(self) -> Stand:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class RunningAdapter(NamedTuple):
    """A session adapter in a process of its own."""

    port: int
    pid: int


@contextmanager
def adapter(
    triton: str,
    repository: Path,
    *,
    metrics_port: int | None = None,
    port: int | None = None,
    log: IO[bytes] | None = None,
) -> Iterator[RunningAdapter]:
    """The adapter in front of a server.

    Args:
        triton: the server's gRPC address.
        repository: what it serves.
        metrics_port: the server's.
        port: where the adapter is to listen; by default a free one.
        log: for what it prints.
    """
    port = port or free_ports(1)[0]
    command = [sys.executable, "-m", "llava_sagemaker.adapter", "--port", str(port)]
    command += ["--triton", triton, "--repository", str(repository)]
    if metrics_port is not None:
        command += ["--triton-metrics", f"127.0.0.1:{metrics_port}"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while ping(port, START_SECONDS) != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the adapter does not answer")
            time.sleep(0.05)
        yield RunningAdapter(port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(START_SECONDS)
        finally:
            process.kill()
            process.wait()


def request(
    port: int,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
    seconds: float = 60.0,
) -> Reply:
    """One HTTP request over a connection of its own.

    Raises:
        OSError, http.client.HTTPException: no answer came, or not in so many seconds.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return Reply(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: Message
    body: bytes


def ping(port: int, seconds: float) -> int:
    """The status of an adapter's /ping; 0 where none comes in so many seconds."""
    try:
        return request(port, "/ping", method="GET", seconds=seconds).status
    except (OSError, http.client.HTTPException):
        return 0
