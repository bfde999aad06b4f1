"""The engines of one machine: a Triton each, started, watched and started again by itself."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_triton.server.installation import find_installation
from llava_triton.server.machine import Share
from llava_triton.server.restarts import POLL_SECONDS, RESTARTS, keep_serving
from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import START_SECONDS, TritonServer, keeps_journal

PORTS = 3
"""Of each engine."""
WRITING_SECONDS = 8.0
"""How long an engine may take, at its end, to write what the journal lacks."""
METRICS_SECONDS = 0.6
"""Its metrics are no older."""
_WAITING = re.compile(r"^llava_journal_records_waiting(?:\{.*\})? (\S+)$", re.MULTILINE)
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy that the environment names: what it reads is on this machine."""


def servers_on(
    repository: Path,
    shares: Sequence[Share],
    ports: Sequence[int],
    *,
    host: str = "127.0.0.1",
    logs: Sequence[Path | None] = (),
    client_shared_memory: bool = False,
) -> list[TritonServer]:
    """A Triton for each share of the machine, none of them started.

    Args:
        repository: what all of them serve.
        shares: of the machine.
        ports: of the first one, for HTTP, gRPC and metrics, where every next one has ports that are
            higher by three; or of all of them, one after the other.
        host, client_shared_memory: see `TritonServer`.
        logs: of each; none: they go with the servers.
    """
    if len(ports) == PORTS:
        ports = [port + PORTS * number for number in range(len(shares)) for port in ports]
    servers = []
    for number, share in enumerate(shares):
        http, grpc, metrics = ports[PORTS * number : PORTS * (number + 1)]
        servers.append(
            TritonServer(
                repository,
                http,
                grpc,
                metrics,
                host=host,
                log=logs[number] if logs else None,
                client_shared_memory=client_shared_memory,
                share=share,
            )
        )
    return servers


def _wait_until_written(server: TritonServer) -> None:
    """Return when the journal has all turns. Triton does not end its models in order where
    sessions are open, so they cannot write at their end."""
    deadline = time.monotonic() + WRITING_SECONDS
    time.sleep(METRICS_SECONDS)
    while server.alive and time.monotonic() < deadline:
        try:
            with _DIRECT.open(server.metrics_url, timeout=1.0) as page:
                waiting = _WAITING.findall(page.read().decode())
        except OSError:
            return
        if not sum(map(float, waiting)):
            return
        time.sleep(POLL_SECONDS)


class Engines:
    """Keeps servers serving, each from a thread of its own: one that dies takes nobody along.

    Args:
        servers: not started yet; only these threads touch them until `stop` returns.
        say: tells the operator; called by any of the threads.
        restarts: how often each is started again in ten minutes.
        start_seconds: how long one may take to load.
    """

    def __init__(
        self,
        servers: Sequence[TritonServer],
        say: Callable[[str], None],
        *,
        restarts: int = RESTARTS,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.servers = servers
        self._say = say
        self._restarts = restarts
        self._start_seconds = start_seconds
        self._has_journal = keeps_journal(servers[0].repository)
        self._lost = "its sessions are lost"
        if self._has_journal:
            self._lost = "its sessions go on from the journal"
        self._stopping = threading.Event()
        self._starts = [0] * len(servers)
        """How often each has become ready."""
        self._began = [0.0] * len(servers)
        self._seconds = [0.0] * len(servers)
        self._failures: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"engine {number}")
            for number in range(len(servers))
        ]

    def start(self) -> None:
        """Start all of them side by side; returns at once.

        Raises:
            InstallationError: there is no Triton on this machine.
        """
        # Here also because it uses `sysconfig`, which two threads must not use first (Python 3.11:
        # one of them finds no values).
        find_installation()
        for thread in self._threads:
            thread.start()

    def look(self) -> None:
        """Whether all are served, or will be.

        Raises:
            ServerError: one of them is not to be started (again): it did not load, or has died too
                often.
            Exception: a fault in its thread.
        """
        if self._failures:
            raise self._failures[0]

    @property
    def starts(self) -> tuple[int, ...]:
        """How often each has become ready."""
        return tuple(self._starts)

    def start_seconds(self, number: int) -> float:
        """How long one took to become ready, the last time."""
        return self._seconds[number]

    def stop(self) -> None:
        """End all of them, side by side; twice does no harm."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for server in self.servers:  # where a thread was never started, nothing is to be ended
            server.stop()

    def _keep(self, number: int) -> None:
        server = self.servers[number]
        try:
            keep_serving(
                lambda: self._start(number),
                server.fault,
                lambda: self._stop_at_once(server),
                lambda text: self._say(self._named(number, text)),
                told=self._stopping.is_set,
                restarts=self._restarts,
                lost=self._lost,
            )
        except Exception as error:
            if isinstance(error, ServerError) and error.args:
                error.args = (self._named(number, str(error.args[0])), *error.args[1:])
            self._failures.append(error)
        else:
            if self._has_journal:
                _wait_until_written(server)
        finally:
            server.stop()

    def _start(self, number: int) -> None:
        began = time.monotonic()
        self.servers[number].start(self._start_seconds, give_up=self._stopping.is_set)
        self._seconds[number] = time.monotonic() - began
        self._starts[number] += 1

    def _stop_at_once(self, server: TritonServer) -> None:
        last_words = server.log_tail()
        server.stop(at_once=True)
        if last_words:  # one that did not start has told why
            self._say(last_words)

    def _named(self, number: int, text: str) -> str:
        return f"engine {number}: {text}" if len(self.servers) > 1 else text
