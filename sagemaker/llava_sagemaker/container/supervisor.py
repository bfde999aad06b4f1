"""Triton and the adapter as children: started, watched, drained."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from llava_sagemaker.container.cloudwatch import MetricsToCloudWatch
from llava_sagemaker.container.errors import ContainerError
from llava_triton.ports import free_ports
from llava_triton.server import TritonServer

POLL_SECONDS = 0.2
DRAIN_SECONDS = 25.0
"""Running turns may take so long after SIGTERM; SageMaker kills the container 30 s after it."""
RESTARTS = 3
"""So often may a model's process die ..."""
RESTARTS_SECONDS = 600.0
"""... in this time. After that the container ends and SageMaker starts another one."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Supervisor:
    """Everything that runs in the container.

    Triton does not start a Python model's process again when it has died: every later request to
    that model fails while Triton calls itself ready. So the whole of Triton is started again then;
    its sessions are lost, and the adapter, which stays, says so to those who ask for them.

    Args:
        port: where the adapter listens, on all addresses.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._told_to_stop = False
        self._may_interrupt = False
        self._stubs: set[int] = set()
        """Processes of Triton's models; they live as long as it does."""
        self._adapter: subprocess.Popen[bytes] | None = None
        self._triton: TritonServer | None = None
        self._log: subprocess.Popen[bytes] | None = None
        self._cloudwatch: MetricsToCloudWatch | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="llava-container-")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def serve(self, repository: Path) -> None:
        """Start everything and return when a signal came and running turns have ended.

        Raises:
            ContainerError: Triton or the adapter died, or a model's process did too often.
            ServerError: Triton does not start.
        """
        ports = free_ports(3)
        self._start_adapter(repository, ports)
        restarts: list[float] = []
        while not self._told_to_stop:
            self._start_triton(repository, ports)
            if not self._watch():
                break
            now = time.monotonic()
            restarts = [each for each in restarts if now - each < RESTARTS_SECONDS] + [now]
            if len(restarts) > RESTARTS:
                raise ContainerError(
                    f"processes of Triton's models died {len(restarts)} times in "
                    f"{RESTARTS_SECONDS / 60:.0f} minutes; see the log above for their last words"
                )
            _say("a process of Triton's models has died: starting Triton again; sessions are lost")
            self._stop_triton()
        self._drain()

    def stop(self) -> None:
        """End what is left. Twice does no harm."""
        if self._cloudwatch is not None:
            self._cloudwatch.stop()
        if self._adapter is not None:
            self._adapter.kill()
            self._adapter.wait()
        self._stop_triton()
        self._folder.cleanup()

    def _start_adapter(self, repository: Path, ports: list[int]) -> None:
        _, grpc, metrics = ports
        command = [sys.executable, "-m", "llava_sagemaker.adapter"]
        command += ["--host", "0.0.0.0", "--port", str(self._port)]
        command += ["--triton", f"127.0.0.1:{grpc}", "--triton-metrics", f"127.0.0.1:{metrics}"]
        command += ["--repository", str(repository)]
        self._adapter = _child(command)

    def _start_triton(self, repository: Path, ports: list[int]) -> None:
        log = Path(self._folder.name) / "triton.log"
        log.touch()
        self._log = _child(["tail", "--bytes=0", "--follow=name", str(log)])
        self._triton = TritonServer(repository, *ports, log=log)
        _say(f"starting Triton on {repository}")
        # A signal breaks the start off; a dead adapter is seen as soon as it is over.
        with self._interruptible():
            self._triton.start()
        if self._told_to_stop:
            return
        self._stubs = self._triton.stubs()
        metrics_url = self._triton.metrics_url
        if self._cloudwatch is None:
            self._cloudwatch = MetricsToCloudWatch.from_environment(metrics_url)
        _say(f"ready: /ping and /invocations answer on port {self._port}")

    def _watch(self) -> bool:
        """Until a signal comes (False) or a model's process has died (True).

        Raises:
            ContainerError: Triton or the adapter has died.
        """
        assert self._triton is not None
        assert self._adapter is not None
        while not self._told_to_stop:
            if self._adapter.poll() is not None:
                raise ContainerError(
                    f"the session adapter has died (exit status {self._adapter.returncode}); its "
                    "last words are above"
                )
            if not self._triton.alive:
                raise ContainerError(
                    f"the Triton server has died; its last words:\n{self._triton.log_tail()}"
                )
            if not self._stubs <= self._triton.stubs():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _drain(self) -> None:
        """Let the adapter end its running turns; it takes no new ones."""
        if self._adapter is None or self._adapter.poll() is not None:
            return
        _say(f"draining: running turns have {DRAIN_SECONDS:.0f} s")
        self._adapter.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._adapter.wait(DRAIN_SECONDS + 2.0)

    def _stop_triton(self) -> None:
        if self._triton is not None:
            self._triton.stop()
            self._triton = None
        if self._log is not None:
            self._log.kill()
            self._log.wait()
            self._log = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told_to_stop = True
        if self._may_interrupt:
            self._may_interrupt = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """A signal breaks off what runs within, quietly."""
        self._may_interrupt = not self._told_to_stop
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            self._may_interrupt = False


def _child(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that does not outlive this one, and that signals to our group do not reach."""
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
    )


def _say(text: str) -> None:
    print(text, flush=True)
