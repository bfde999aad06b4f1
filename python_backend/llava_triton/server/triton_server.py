"""A Triton server as a child process that behaves: it starts, says so, and leaves nothing behind.

    with TritonServer("build/repositories/demo") as server:
        ...  # server.http_url, server.grpc_url

or, in the foreground, `python -m llava_triton.server --repository build/repositories/demo`.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from llava_triton.contract.settings import Settings
from llava_triton.server import server_guard
from llava_triton.server.crash_handler import CrashHandler
from llava_triton.server.installation import CPU_ENVIRONMENT, Installation, find_installation
from llava_triton.server.machine import Share
from llava_triton.server.model_processes import ModelProcesses, is_dead
from llava_triton.server.ports import check_ports, free_ports
from llava_triton.server.run_folder import make_run_folder
from llava_triton.server.server_error import ServerError, StartCrashError

__all__ = ["CPU_ENVIRONMENT", "ServerError", "TritonServer", "free_ports"]

START_SECONDS = 300.0
"""Loading a large language model takes minutes; a server that dies is noticed at once anyway."""
_GPU_POOL_BYTES = 512 * 1024 * 1024
_EXIT_SECONDS = 1
"""Triton's own wait, at its end, for open sequences and running requests. Where there are any then,
it ends without ending its models."""

_RESTRICT = ("http-restricted-api", "grpc-restricted-protocol")
_CONTROL = ("model-repository", "trace", "logging")
"""What no client of ours needs: by these protocols anybody who reaches a port silences the log,
fills it with session IDs, or lists the models. (perf_analyzer needs the models' configurations and
statistics; what they tell, /metrics tells too.)"""


def _closed(*protocols: str) -> str:
    """The value of Triton's option that restricts protocols: nobody is let through.

    Triton takes the header that lets one through only from its command line, which every user of
    the machine can read. So the header's name is one that cannot be sent: in HTTP/1 a name ends at
    the first colon, and HTTP/2 allows none in it. The random value that nobody is told, too, is for
    the case that it could.
    """
    return f"{','.join(protocols)}:(closed: by this server)={secrets.token_urlsafe(32)}"


def keeps_journal(repository: Path) -> bool:
    """Whether the models of a repository write their sessions down."""
    try:
        return bool(Settings.of_repository(repository).journal)
    except (OSError, ValueError, TypeError):  # its models will say so
        return False


class TritonServer:
    """One Triton server on one model repository, from `start()` to `stop()`.

    Args:
        repository: the model repository to serve.
        http_port, grpc_port, metrics_port: where to listen.
        host: the address to listen on. Not to be opened to a network: any client may use any
            session whose ID it knows, and can end the server (docs/triton-ports.md).
        log: file for the server's and the models' output; kept. Default: one that goes with the
            server, `log_tail()` reads it.
        client_shared_memory: whether clients may pass tensors in shared memory. They can name any
            region then, the models' own with other clients' questions among them.
        share: of the machine; by default all of it.
    """

    def __init__(
        self,
        repository: str | Path,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        *,
        host: str = "127.0.0.1",
        log: Path | None = None,
        client_shared_memory: bool = False,
        share: Share | None = None,
    ) -> None:
        self.repository = Path(repository)
        self.ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self.host = host
        self.log = log
        self.client_shared_memory = client_shared_memory
        self._share = share or Share()
        self.pid = 0
        """tritonserver's process ID, while it runs."""
        self._models = ModelProcesses({})
        self._guard: subprocess.Popen[bytes] | None = None
        self._run_folder: Path | None = None
        self._log_file: IO[bytes] | None = None
        self._log_start = 0
        """Where in its log the server's present life begins."""
        self._crash_handler: CrashHandler | None = None

    @property
    def http_address(self) -> str:
        """`host:port`, as tritonclient.http takes it."""
        return f"{self._reachable_host}:{self.ports['http']}"

    @property
    def grpc_address(self) -> str:
        """`host:port`, as tritonclient.grpc takes it."""
        return f"{self._reachable_host}:{self.ports['grpc']}"

    @property
    def http_url(self) -> str:
        """URL of the HTTP endpoint."""
        return f"http://{self.http_address}"

    @property
    def grpc_url(self) -> str:
        """URL of the gRPC endpoint."""
        return f"grpc://{self.grpc_address}"

    @property
    def metrics_address(self) -> str:
        """`host:port` of the Prometheus metrics."""
        return f"{self._reachable_host}:{self.ports['metrics']}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self.metrics_address}/metrics"

    @property
    def _reachable_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        # The guard outlives it for as long as it cleans up.
        running = self._guard is not None and self._guard.poll() is None
        return running and not is_dead(self.pid)

    def stubs(self) -> dict[int, str]:
        """Processes of the Python models, and the model of each."""
        return server_guard.stubs(self._run_folder.name) if self._run_folder else {}

    def fault(self) -> str | None:
        """What has happened to the running server so that it is of no use and must be started
        again, such as "the process of language_model has died (signal 9)"; None: nothing."""
        found = self._models.fault()
        if self.alive:  # looked at last: its models die with it
            stuck = self._crash_handler and self._crash_handler.caught()
            if stuck:
                return f"the Triton server has crashed (signal {stuck}) and does not end"
            return found
        assert self._guard is not None, "not started"
        status = self._guard.wait()
        if status > 128 and status != 128 + signal.SIGKILL:
            return f"the Triton server has crashed (signal {status - 128})"
        cause = f"signal {status - 128}" if status > 128 else f"exit status {status}"
        return f"the Triton server has died ({cause})"

    def start(
        self, timeout: float = START_SECONDS, give_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Start the server and return when every model is ready.

        One that was stopped can be started again; its log goes on.

        Args:
            timeout: seconds that it may take.
            give_up: asked all the time meanwhile: whether it is not wanted any more.

        Raises:
            PortError: a port is taken.
            StartCrashError: a signal killed it.
            ServerError: there is no Triton server on this machine or no such repository, a model
                failed to load, `timeout` seconds passed, or it is not wanted any more.
        """
        if self._guard is not None:
            raise ServerError("this server was started already")
        if not any(self.repository.glob("*/config.pbtxt")):
            raise ServerError(
                f"{self.repository} is no model repository: no folder in it holds a config.pbtxt; "
                "fill one with `make export MODEL=...`"
            )
        check_ports(self.host, self.ports)
        installation = find_installation()
        try:
            self._spawn(installation)
            self._wait_until_ready(timeout, give_up)
            self._models = ModelProcesses(self.stubs())
        except BaseException:  # an interrupt too must leave nothing behind
            self.stop()
            raise

    def _spawn(self, installation: Installation) -> None:
        self._run_folder = make_run_folder()
        log = self.log or self._run_folder / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        goes_on = self.log is not None and self._log_file is not None
        self._log_file = log.open("a+b" if goes_on else "w+b")
        self._log_start = self._log_file.seek(0, os.SEEK_END)
        guard = [
            sys.executable,
            "-I",
            server_guard.__file__,
            str(os.getpid()),
            str(self._run_folder),
        ]
        with self._share.taken():
            self._guard = subprocess.Popen(
                [*guard, *self._command(installation, self._run_folder)],
                env=installation.environment(self._run_folder) | self._share.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log_file,
                start_new_session=True,  # Ctrl-C in a terminal must reach us alone
            )
        assert self._guard.stdout is not None
        line = self._guard.stdout.readline()
        if not line:
            raise ServerError(f"{installation.binary} could not be started:\n{self.log_tail()}")
        self.pid = int(line)
        self._crash_handler = CrashHandler(self.pid, self._log_file.fileno(), self._log_start)

    def _command(self, installation: Installation, run_folder: Path) -> list[str]:
        # The Python backend starts its stubs through a shell without quoting the model's path.
        link = run_folder / "repository"
        link.symlink_to(self.repository.resolve(), target_is_directory=True)
        options: dict[str, object] = {
            "model-repository": link,
            "backend-directory": installation.backend_directory(run_folder),
            "backend-config": f"python,shm-region-prefix-name={run_folder.name}-",
            "exit-timeout-secs": _EXIT_SECONDS,
            # Image features go from model to model in it: of pictures that are opened together.
            "cuda-memory-pool-byte-size": f"0:{_GPU_POOL_BYTES}",
            **{option: _closed(*self._closed_protocols) for option in _RESTRICT},
            # Where that pool is full, Triton takes host memory. Not pinned: the Python backend's
            # stub copies to that as if it were a GPU's, and features of nobody's would go on.
            "pinned-memory-pool-byte-size": 0,
        }
        for service, port in self.ports.items():
            options[f"{service}-address"] = self.host
            options[f"{service}-port"] = port
        return [
            str(installation.binary),
            "--disable-auto-complete-config",
            *(f"--{name}={value}" for name, value in options.items()),
        ]

    @property
    def _closed_protocols(self) -> tuple[str, ...]:
        return _CONTROL if self.client_shared_memory else (*_CONTROL, "shared-memory")

    def _wait_until_ready(self, timeout: float, give_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            self._close_shared_memory()
            if give_up():
                raise ServerError("the Triton server was told to end while it started")
            if not self.alive:
                check_ports(self.host, self.ports)  # another program was faster
                assert self._guard is not None
                crashed = self._guard.wait() > 128
                kind = StartCrashError if crashed else ServerError
                raise kind(f"the Triton server did not start:\n{self._failure()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the Triton server was not ready after {timeout:.0f} seconds; the end of its "
                    f"log:\n{self.log_tail()}"
                )
            time.sleep(0.05)
        self._close_shared_memory()

    def _close_shared_memory(self) -> None:
        """What passes between the models is not for other users of the machine, to whom the Python
        backend opens it for reading."""
        assert self._run_folder is not None
        for region in server_guard.shared_memory(self._run_folder.name):
            with contextlib.suppress(FileNotFoundError):  # its model has just failed
                region.chmod(0o600)

    def _is_ready(self) -> bool:
        """Whether every model is, and the metrics port: Triton opens it last."""
        return self._answers("http", "/v2/health/ready") and self._answers("metrics", "/metrics")

    def _answers(self, port: str, path: str) -> bool:
        connection = http.client.HTTPConnection(self._reachable_host, self.ports[port], timeout=2.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self, *, at_once: bool = False) -> None:
        """Stop the server and everything it started, within 3 seconds; twice does no harm.

        Args:
            at_once: kill it. Triton's own end waits for answers in flight, which may never come.
        """
        guard, run_folder = self._guard, self._run_folder
        if guard is not None and guard.stdin is not None and guard.stdout is not None:
            if at_once:
                with contextlib.suppress(BrokenPipeError):  # the guard is dead
                    os.write(guard.stdin.fileno(), server_guard.KILL)
            guard.stdin.close()
            try:
                guard.wait(timeout=server_guard.GRACE_SECONDS + 3.0)
            except subprocess.TimeoutExpired:
                guard.kill()  # tritonserver dies with it
                guard.wait()
            guard.stdout.close()
        if run_folder is not None and run_folder.exists():  # the guard was killed
            server_guard.remove_traces(run_folder)
        if self._log_file is not None:
            self._log_file.close()
        self.pid, self._guard, self._run_folder = 0, None, None
        self._models = ModelProcesses({})

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log, without its tables."""
        kept = [line for line in self._log_text().splitlines() if not line.startswith(("|", "+"))]
        return "\n".join(kept[-lines:])

    def _failure(self) -> str:
        """The part of the log that tells why the server did not start."""
        text = "\n".join(_load_failures(self._log_text())) or self.log_tail()
        return text.replace(f"{self._run_folder}/repository", str(self.repository))

    def _log_text(self) -> str:
        if self._log_file is None or self._log_file.closed:
            return ""
        # Read through our own descriptor: the guard has removed the file's name by now.
        descriptor = self._log_file.fileno()
        size = os.fstat(descriptor).st_size
        start = max(self._log_start, size - 1_000_000)
        return os.pread(descriptor, size - start, start).decode(errors="replace")

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


_LOAD_FAILURE = re.compile(
    r"""^E.*\]\ "(?:
        failed\ to\ load\ '(?P<model>[^']+)'\ version\ \d+:
        | Poll\ failed\ for\ model\ directory\ '(?P<directory>[^']+)':
    )\s*(?P<reason>.*)"$""",
    re.MULTILINE | re.VERBOSE,
)


def _load_failures(log: str) -> list[str]:
    """What Triton's log says about models that it could not load, one text a model."""
    failures = []
    for match in _LOAD_FAILURE.finditer(log):
        reason = match["reason"].replace("\\n", "\n    ").rstrip()
        failures.append(f"  {match['model'] or match['directory']}: {reason}")
    return failures
