"""Serving in the foreground, as a terminal or a service manager runs it: until a signal comes."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from llava_triton.contract.engines import ENGINES
from llava_triton.server.engines import Engines, servers_on
from llava_triton.server.machine import shares
from llava_triton.server.restarts import POLL_SECONDS, RESTARTS, RESTARTS_SECONDS
from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import TritonServer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Companion(Protocol):
    """What serves beside Triton, for as long as Triton does."""

    @property
    def name(self) -> str:
        """For the list of what listens where."""

    @property
    def host(self) -> str:
        """The address that it listens on."""

    @property
    def url(self) -> str:
        """Where it listens."""

    def start(self) -> None:
        """Start it, before Triton. Raises ServerError."""

    def look(self) -> None:
        """Called five times a second: start it again where it has died.

        Raises:
            ServerError: it has died too often.
        """

    def stop(self) -> None:
        """End it. Twice does no harm."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """End the command once; more signals must not disturb the clean-up."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # Python drops what is raised in a finalizer: once more, then, until `serve` has heard of it.
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    raise KeyboardInterrupt


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):  # what listens there will say so
        return False


OPEN_PORTS = """\
warning: Triton's ports are open to others at {host}. Whoever reaches them can use any session whose
  ID he knows, and can end the server or fill its memory with one request: this Triton limits
  neither sizes, nor chunks, nor what it unpacks. Open the session adapter instead, or put a proxy
  with limits in front: docs/triton-ports.md"""


OPEN_COMPANION = """\
{name}'s port is open to others at {host}: it limits what they send, and asks for a key where
  LLAVA_API_KEY is set. Triton's own ports are for trusted networks only: docs/triton-ports.md"""


def serve(
    servers: Sequence[TritonServer],
    *,
    restarts: int = RESTARTS,
    companion: Companion | None = None,
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP comes, and print how it goes.

    Takes over these signals for the rest of the process's life.

    Args:
        servers: of one repository, not started yet: an engine each.
        restarts: how often each is started again in ten minutes when a part of it dies.
        companion: what serves beside them.

    Returns:
        An exit status: 0 after a signal, 1 where one did not start or died too often.
    """
    for number in SIGNALS:
        signal.signal(number, interrupt)
    if not is_loopback(servers[0].host):
        print(OPEN_PORTS.format(host=servers[0].host), file=sys.stderr, flush=True)
    if companion is not None and not is_loopback(companion.host):
        _say(OPEN_COMPANION.format(name=companion.name, host=companion.host))
    engines = Engines(servers, _say, restarts=restarts)
    try:
        if companion is not None:
            companion.start()
        _say(f"starting Triton on {servers[0].repository} ...")
        engines.start()
        _watch(engines, companion)
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
    except (ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if companion is not None:
            companion.stop()
        engines.stop()
    print("stopped", flush=True)
    return 0


def _watch(engines: Engines, companion: Companion | None) -> NoReturn:
    """Look after them until something ends it, and tell of those that have become ready."""
    told = (0,) * len(engines.servers)
    while True:
        if companion is not None:
            companion.look()
        engines.look()
        starts = engines.starts
        for number, server in enumerate(engines.servers):
            if starts[number] > told[number]:
                _tell(engines, number, server)
        if starts != told and all(starts):
            if companion is not None:
                print(f"  {companion.name:8} {companion.url}")
            _say("Ctrl-C stops it.")
        told = starts
        time.sleep(POLL_SECONDS)


def _tell(engines: Engines, number: int, server: TritonServer) -> None:
    name = f"engine {number} " if len(engines.servers) > 1 else ""
    print(f"{name}ready after {engines.start_seconds(number):.1f} s (process {server.pid})")
    print(f"  HTTP     {server.http_url}")
    print(f"  gRPC     {server.grpc_url}")
    print(f"  metrics  {server.metrics_url}")
    if server.log is not None:
        print(f"  log      {server.log}")


def _say(text: str) -> None:
    print(text, flush=True)


def logs_beside(log: Path | None, engines: int) -> list[Path | None]:
    """The logs of so many engines: one's is called as it was asked for, `NAME.log`; of several,
    `NAME-0.log` and so on."""
    if log is None or engines == 1:
        return [log] * engines
    return [log.with_stem(f"{log.stem}-{number}") for number in range(engines)]


def main(arguments: list[str] | None = None) -> int:
    """Serve a repository in the foreground until a signal comes; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m llava_triton.server", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="model repository to serve")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--log", type=Path, help="file for the output of the server and models")
    parser.add_argument(
        "--client-shared-memory",
        action="store_true",
        help="let clients pass tensors in shared memory, where they can also read other clients'",
    )
    parser.add_argument(
        "--no-restart",
        action="store_true",
        help=f"end when a model's process dies, instead of starting Triton again (at most "
        f"{RESTARTS} times in {RESTARTS_SECONDS / 60:.0f} minutes)",
    )
    parser.add_argument(
        "--engines",
        type=int,
        help=f"how many, each with ports of its own, higher by three (default: {ENGINES}, else one "
        "a GPU)",
    )
    options = parser.parse_args(arguments)
    try:
        machine = shares(options.engines)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    servers = servers_on(
        options.repository,
        machine,
        [options.http_port, options.grpc_port, options.metrics_port],
        host=options.host,
        logs=logs_beside(options.log, len(machine)),
        client_shared_memory=options.client_shared_memory,
    )
    return serve(servers, restarts=0 if options.no_restart else RESTARTS)
