"""The endpoint's instances: each the container's entry point, with a Triton of its own."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from llava_triton.server.ports import free_ports

POLL_SECONDS = 0.5
PING_SECONDS = 2.0
START_SECONDS = 300.0
STOP_SECONDS = 35.0
"""The container drains for 20 s, and its engines end within 9."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class InstanceError(Exception):
    """An instance does not start; the sentence says where its log is."""


class LocalInstance:
    """One instance, started again whenever it ends.

    Args:
        number: from 1.
        repository: the model repository it serves.
        log: file for what it prints.
        endpoint: the endpoint's name.
    """

    def __init__(self, number: int, repository: Path, log: Path) -> None:
        self.number = number
        self.log = log
        (self.port,) = free_ports(1)
        self.in_service = False
        """Whether its last ping was answered with 200."""
        self.generation = 0
        """How often it was started."""
        self._repository = repository
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where its adapter listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of its entry point."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it; returns at once."""
        self.generation += 1
        self.in_service = False
        command = [sys.executable, "-m", "llava_sagemaker.container", "--port", str(self.port)]
        command += ["--model-dir", str(self._repository)]
        # SageMaker has checked who calls, and passes no key of the container's own on.
        ours = ("SAGEMAKER_BIND_TO_PORT", "LLAVA_API_KEY")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def look(self) -> None:
        """Ping it, and start it again where it has ended. Takes up to PING_SECONDS."""
        assert self._process is not None
        if self._process.poll() is not None:
            print(
                f"instance {self.number} has ended and starts again (log: {self.log})", flush=True
            )
            self.start()
        try:
            with urllib.request.urlopen(f"{self.url}/ping", timeout=PING_SECONDS) as response:
                self.in_service = response.status == 200
        except (OSError, urllib.error.HTTPError):
            self.in_service = False

    def failed(self) -> None:
        """A request could not reach it."""
        self.in_service = False

    def terminate(self) -> None:
        """Tell it to end."""
        if self._process is not None:
            self._process.terminate()

    def wait(self) -> None:
        """Until it has ended; it is killed when that takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def has_ended(self) -> bool:
        """Whether its entry point has ended by itself."""
        return self._process is not None and self._process.poll() is not None


def start_all(instances: Sequence[LocalInstance]) -> None:
    """Start them and return when every one is in service; prints how it goes.

    Raises:
        InstanceError: one ends, or takes too long.
    """
    began = time.monotonic()
    for instance in instances:
        instance.start()
        print(f"instance {instance.number} starts (log: {instance.log})", flush=True)
    waiting = list(instances)
    while waiting:
        for instance in list(waiting):
            if instance.has_ended() or time.monotonic() - began > START_SECONDS:
                last = instance.log.read_text(errors="replace").splitlines()[-3:]
                raise InstanceError(
                    f"instance {instance.number} has not started; the end of its log "
                    f"({instance.log}):\n" + "\n".join(last)
                )
            instance.look()
            if instance.in_service:
                seconds = time.monotonic() - began
                print(f"instance {instance.number} is ready after {seconds:.0f} s", flush=True)
                waiting.remove(instance)
        time.sleep(POLL_SECONDS)


async def watch(instances: Sequence[LocalInstance]) -> None:
    """Look after them for ever, as SageMaker does."""
    while True:
        await asyncio.gather(*(asyncio.to_thread(instance.look) for instance in instances))
        await asyncio.sleep(POLL_SECONDS)
