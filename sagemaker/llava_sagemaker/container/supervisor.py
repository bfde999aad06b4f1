"""The engines and the adapter as children: started, watched, drained."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from llava_sagemaker.adapter_process import KeptAdapter
from llava_sagemaker.container.cloudwatch import MetricsToCloudWatch
from llava_sagemaker.container.errors import ContainerError
from llava_sagemaker.container.stop_signal import Stopped, StopSignal
from llava_triton.server.child import start_child
from llava_triton.server.engines import PORTS, Engines, servers_on
from llava_triton.server.machine import shares
from llava_triton.server.ports import PortError, free_ports
from llava_triton.server.restarts import POLL_SECONDS, RESTARTS
from llava_triton.server.server_error import ServerError

__all__ = ["RESTARTS", "Supervisor", "check_port"]

START_SECONDS = 1800.0
"""How long Triton may load: as long as SageMaker is told to wait for the first /ping."""
DRAIN_SECONDS = 20.0
"""After SIGTERM the adapter ends running turns within about so long. SageMaker kills us after 30 s,
and the engines need some of them to write what the journal has not."""


class Supervisor:
    """Everything that runs in the container: an engine a GPU, and the adapter in front of them.

    What dies is started again: an engine's Triton as soon as one of its processes dies or is
    stopped (`server/engines.py`), while the other engines serve on; the adapter, whose sessions are
    the engines'. What dies too often ends the container, and SageMaker starts another one. (What
    lives but does not answer is seen by /ping, and SageMaker replaces the container.)

    Args:
        port: where the adapter listens, on all addresses.
        stop: the signals that end it.
        restarts: how often each part is started again in ten minutes.
    """

    def __init__(self, port: int, stop: StopSignal, restarts: int = RESTARTS) -> None:
        self._port = port
        self._signal = stop
        self._restarts = restarts
        self._adapter: KeptAdapter | None = None
        self._engines: Engines | None = None
        self._logs: list[IO[bytes]] = []
        self._tails: list[subprocess.Popen[bytes]] = []
        self._cloudwatch: MetricsToCloudWatch | None = None

    def serve(self, repository: Path) -> None:
        """Start everything and return when a signal came and running turns have ended.

        Raises:
            Stopped: a signal came while nothing was served.
            ContainerError: the adapter or an engine has died too often.
            ServerError: Triton does not start.
        """
        while True:
            try:
                self._start(repository)
                self._watch()
            except PortError as error:
                if self._has_served:
                    raise
                _say(f"{error.args[0].partition(';')[0]}: starting again on other ports")
                self._stop_all()
            except ServerError as error:
                if not self._has_served:
                    raise
                self._drain()  # the other engines have sessions
                raise ContainerError(str(error)) from None
            else:
                break
        self._drain()

    def stop(self) -> None:
        """End what is left. Twice does no harm."""
        if self._cloudwatch is not None:
            self._cloudwatch.stop()
        self._stop_all()

    @property
    def _has_served(self) -> bool:
        return self._engines is not None and any(self._engines.starts)

    def _start(self, repository: Path) -> None:
        """The engines, and the adapter in front of them: it says 503 until one serves."""
        machine = shares()
        self._logs = [tempfile.TemporaryFile() for _ in machine]  # noqa: SIM115 - closed by _stop_all
        servers = servers_on(
            repository,
            machine,
            free_ports(PORTS * len(machine)),
            # Of each log, nameless so that nothing of it can stay behind, `tail` makes ours.
            logs=[Path(f"/proc/{os.getpid()}/fd/{log.fileno()}") for log in self._logs],
        )
        self._tails = [start_child(_TAIL, stdin=log) for log in self._logs]
        self._adapter = KeptAdapter("0.0.0.0", self._port, servers, self._restarts)
        self._adapter.start()
        self._engines = Engines(servers, _say, restarts=self._restarts, start_seconds=START_SECONDS)
        several = f" with {len(machine)} engines" if len(machine) > 1 else ""
        _say(f"starting Triton on {repository}{several}")
        self._engines.start()

    def _watch(self) -> None:
        """Look after all of it until a signal comes.

        Raises:
            Stopped: one came while nothing was served.
            ServerError: something is not to be started again.
        """
        assert self._adapter is not None
        assert self._engines is not None
        told = 0
        while True:
            self._adapter.look()
            self._engines.look()
            if self._signal.told:
                if not self._has_served:
                    raise Stopped
                return
            if (starts := sum(self._engines.starts)) > told:
                told = starts
                self._tell_ready()
            time.sleep(POLL_SECONDS)

    def _tell_ready(self) -> None:
        assert self._engines is not None
        servers = self._engines.servers
        if self._cloudwatch is None:
            urls = [server.metrics_url for server in servers]
            self._cloudwatch = MetricsToCloudWatch.from_environment(urls)
        started = sum(map(bool, self._engines.starts))
        of_all = f" ({started} of {len(servers)} engines)" if len(servers) > 1 else ""
        _say(f"ready{of_all}: /ping and /invocations answer on port {self._port}")

    def _drain(self) -> None:
        _say(f"draining: running turns have {DRAIN_SECONDS - 1:.0f} s")
        if self._adapter is not None:
            self._adapter.stop(DRAIN_SECONDS)

    def _stop_all(self) -> None:
        if self._engines is not None:
            self._engines.stop()
            self._engines = None
        if self._adapter is not None:
            # Turns that were in flight have failed by now; it has only to tell that.
            self._adapter.stop(patience=2.0)
            self._adapter = None
        for tail in self._tails:
            tail.kill()
            tail.wait()
        for log in self._logs:
            log.close()
        self._tails, self._logs = [], []


_TAIL = ["tail", "--bytes=+1", "--follow", "--sleep-interval=0.2"]


def check_port(port: int) -> None:
    """Raises ContainerError unless the adapter may listen on `port`: before minutes of loading."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not between 1 and 65535"
            raise ContainerError(
                f"port {port} cannot be listened on ({reason}); end what listens there, or choose "
                "another with --port or SAGEMAKER_BIND_TO_PORT"
            ) from None


def _say(text: str) -> None:
    print(text, flush=True)
