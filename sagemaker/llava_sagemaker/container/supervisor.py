"""Triton and the adapter as children: started, watched, drained."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from pathlib import Path

from llava_sagemaker.adapter_process import AdapterProcess
from llava_sagemaker.container.cloudwatch import MetricsToCloudWatch
from llava_sagemaker.container.errors import ContainerError
from llava_sagemaker.container.stop_signal import StopSignal
from llava_triton.server.child import start_child
from llava_triton.server.ports import PortError, free_ports
from llava_triton.server.restarts import RESTARTS, DiesAgainError, keep_serving
from llava_triton.server.triton_server import ServerError, TritonServer

__all__ = ["RESTARTS", "Supervisor", "check_port"]

START_SECONDS = 1800.0
"""How long Triton may load: as long as SageMaker is told to wait for the first /ping."""
DRAIN_SECONDS = 26.0
"""After SIGTERM the adapter gives running turns 25 s and ends; SageMaker kills us after 30."""


class Supervisor:
    """Everything that runs in the container.

    Where a process of Triton's models dies or is stopped, or Triton crashes, the whole of Triton is
    started again (`server/restarts.py`); its sessions are lost, and the adapter, which stays,
    says so to those who ask for them. What dies too often ends the container, and SageMaker starts
    another one. (What lives but does not answer is seen by /ping, and SageMaker replaces the
    container.)

    Args:
        port: where the adapter listens, on all addresses.
        stop: the signals that end it.
    """

    def __init__(self, port: int, stop: StopSignal) -> None:
        self._port = port
        self._signal = stop
        self._triton_ports: list[int] = []
        """HTTP, gRPC, metrics; the adapter knows them from its start."""
        self._adapter: AdapterProcess | None = None
        self._triton: TritonServer | None = None
        self._log: subprocess.Popen[bytes] | None = None
        self._cloudwatch: MetricsToCloudWatch | None = None

    def serve(self, repository: Path) -> None:
        """Start everything and return when a signal came and running turns have ended.

        Raises:
            Stopped: a signal came while nothing was served.
            ContainerError: the adapter died, or Triton or its models did too often.
            ServerError: Triton does not start.
        """
        try:
            keep_serving(
                lambda: self._start(repository),
                self._watch,
                lambda: self._stop_triton(at_once=True),
                _say,
                told=lambda: self._signal.told,
            )
        except DiesAgainError as error:
            raise ContainerError(str(error)) from None
        _say(f"draining: running turns have {DRAIN_SECONDS - 1:.0f} s")
        self._stop_adapter(DRAIN_SECONDS)

    def stop(self) -> None:
        """End what is left. Twice does no harm."""
        if self._cloudwatch is not None:
            self._cloudwatch.stop()
        self._stop_triton()
        # Turns that were under way have failed by now; it has only to tell that.
        self._stop_adapter(patience=2.0)

    def _start(self, repository: Path) -> None:
        """Triton, and before it the adapter unless it runs: it says 503 meanwhile.

        Where another program takes one of Triton's ports before Triton does, both start again on
        others.
        """
        while True:
            if self._adapter is None:
                self._triton_ports = free_ports(3)
                self._start_adapter(repository)
            try:
                self._start_triton(repository)
            except PortError as error:
                _say(f"{error.args[0].partition(';')[0]}: starting again on other ports")
                self._stop_triton()
                self._stop_adapter(patience=2.0)
            else:
                return

    def _start_adapter(self, repository: Path) -> None:
        _, grpc, metrics = self._triton_ports
        self._adapter = AdapterProcess(
            "0.0.0.0", self._port, f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", repository
        )
        self._adapter.start()

    def _start_triton(self, repository: Path) -> None:
        # Of the log, nameless so that nothing of it can stay behind, `tail` makes ours.
        with tempfile.TemporaryFile() as log:
            self._log = start_child(
                ["tail", "--bytes=+1", "--follow", "--sleep-interval=0.2"], stdin=log
            )
            path = Path(f"/proc/self/fd/{log.fileno()}")
            self._triton = TritonServer(repository, *self._triton_ports, log=path)
            _say(f"starting Triton on {repository}")
            with self._signal.at_once():
                self._triton.start(START_SECONDS)
        if self._cloudwatch is None:
            self._cloudwatch = MetricsToCloudWatch.from_environment(self._triton.metrics_url)
        _say(f"ready: /ping and /invocations answer on port {self._port}")

    def _watch(self) -> str | None:
        """What has happened to Triton so that it must be started again.

        Raises:
            ContainerError: Triton or the adapter has died, and is not to be.
        """
        assert self._triton is not None
        assert self._adapter is not None
        status = self._adapter.exit_status()
        if status is not None:
            raise ContainerError(
                f"the session adapter has died (exit status {status}); its last words are above"
            )
        try:
            return self._triton.fault()
        except ServerError as error:
            raise ContainerError(f"Triton has died: {error}") from None

    def _stop_adapter(self, patience: float) -> None:
        if self._adapter is not None:
            self._adapter.stop(patience)
            self._adapter = None

    def _stop_triton(self, *, at_once: bool = False) -> None:
        if self._triton is not None:
            self._triton.stop(at_once=at_once)
            self._triton = None
        if self._log is not None:
            self._log.kill()
            self._log.wait()
            self._log = None


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
