"""`python -m llava_triton.server` as a child process, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil

STOP_SECONDS = 20.0
"""More than that is a hang; it takes 2 to 3, which a busy machine may stretch."""
SERVICES = ("http", "grpc", "metrics")


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; who has may still wait for its parent to take notice."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Family:
    """A server's processes and shared memory, noted while it runs."""

    def __init__(self, tritonserver: int) -> None:
        server = psutil.Process(tritonserver)
        self.processes = [server, *server.children(recursive=True)]
        self.parents = server.parents()[:1]
        option = next(part for part in server.cmdline() if "shm-region-prefix-name=" in part)
        self.name = option.rpartition("=")[2].rstrip("-")
        assert len(self.processes) > 1, "the Python model's stub is missing"
        assert self._shared_memory(), "the stub's shared memory is missing"

    def assert_gone(self, within: float) -> None:
        deadline = time.monotonic() + within
        while left := self._left():
            assert time.monotonic() < deadline, f"still there after {within} s: {left}"
            time.sleep(0.05)

    def _left(self) -> list[object]:
        processes = living(self.processes + self.parents)
        return [*processes, *self._shared_memory(), *Path("/tmp").glob(f"{self.name}*")]

    def _shared_memory(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"{self.name}*"))


class Command:
    """`python -m llava_triton.server` in a process group of its own, as a terminal runs it."""

    def __init__(self, repository: Path, ports: list[int], *more: str) -> None:
        options = [f"--{name}-port={port}" for name, port in zip(SERVICES, ports, strict=True)]
        options += more
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava_triton.server", "--repository", repository, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self.ports = ports

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.ports[1]}"

    def wait_until_ready(self) -> Family:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("Ctrl-C"):
                break
        command = psutil.Process(self.process.pid)
        servers = [
            child for child in command.children(recursive=True) if child.name() == "tritonserver"
        ]
        assert len(servers) == 1, self.output
        return Family(servers[0].pid)

    def wait(self) -> int:
        assert self.process.stdout is not None
        status = self.process.wait(timeout=STOP_SECONDS)
        self.output += self.process.stdout.read()
        return status
