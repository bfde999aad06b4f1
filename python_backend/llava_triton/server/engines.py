"""The engines of one machine: a Triton each, started, watched and started again by itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_triton.contract.settings import Settings
from llava_triton.server.machine import Share
from llava_triton.server.restarts import RESTARTS, keep_serving
from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import START_SECONDS, TritonServer

PORTS = 3
"""Of each engine."""


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


def becomes_of_sessions(repository: Path) -> str:
    """What becomes of the sessions of a server that has died, for the operator."""
    try:
        has_journal = bool(Settings.of_repository(repository).journal)
    except (OSError, ValueError, TypeError):  # its models will say so
        has_journal = False
    return "its sessions go on from the journal" if has_journal else "its sessions are lost"


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
        self._lost = becomes_of_sessions(servers[0].repository)
        self._stopping = threading.Event()
        self._starts = [0] * len(servers)
        """How often each has become ready."""
        self._began = [0.0] * len(servers)
        self._seconds = [0.0] * len(servers)
        self._failures: list[ServerError | OSError] = []
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"engine {number}")
            for number in range(len(servers))
        ]

    def start(self) -> None:
        """Start all of them side by side; returns at once."""
        for thread in self._threads:
            thread.start()

    def look(self) -> None:
        """Whether all are served, or will be.

        Raises:
            ServerError, OSError: one of them is not to be started (again): it did not load, or has
                died too often.
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
        except (ServerError, OSError) as error:
            if not self._stopping.is_set():
                with contextlib.suppress(IndexError):  # else of a class that says more, as it is
                    error.args = (self._named(number, str(error.args[0])), *error.args[1:])
                self._failures.append(error)
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
