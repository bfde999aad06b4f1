"""A Triton server as a child process that behaves: it starts, says so, and leaves nothing behind.

    with TritonServer("build/repositories/demo") as server:
        ...  # server.http_url, server.grpc_url

or, in the foreground, `python -m llava_triton.server --repository build/repositories/demo`.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NoReturn

from llava_triton import server_guard
from llava_triton.ports import check_ports, free_ports
from llava_triton.server_error import ServerError
from llava_triton.triton_installation import CPU_ENVIRONMENT, Installation, find_installation

__all__ = ["CPU_ENVIRONMENT", "ServerError", "TritonServer", "free_ports"]

START_SECONDS = 300.0
"""Loading a large language model takes minutes; a server that dies is noticed at once anyway."""
_GPU_POOL_BYTES = 512 * 1024 * 1024
_EXIT_SECONDS = 1
"""Triton's own wait, at its end, for open sequences and running requests."""


class TritonServer:
    """One Triton server on one model repository, from `start()` to `stop()`.

    Args:
        repository: the model repository to serve.
        http_port, grpc_port, metrics_port: where to listen.
        host: the address to listen on. Not to be opened to a network: this server trusts its
            clients (any of them may use any session whose ID it knows).
        log: file for the server's and the models' output; kept. Default: one that goes with the
            server, `log_tail()` reads it.
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
    ) -> None:
        self.repository = Path(repository)
        self.ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self.host = host
        self.log = log
        self.pid = 0
        """tritonserver's process ID, while it runs."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._run_folder: Path | None = None
        self._log_file: IO[bytes] | None = None

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
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self._reachable_host}:{self.ports['metrics']}/metrics"

    @property
    def _reachable_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        # The guard outlives it for as long as it cleans up.
        running = self._guard is not None and self._guard.poll() is None
        return running and not _is_dead(self.pid)

    def stubs(self) -> set[int]:
        """Process IDs of the Python models: one each while the server is well. Triton does not
        start one again that has died."""
        return set(server_guard.stubs(self._run_folder.name)) if self._run_folder else set()

    def start(self, timeout: float = START_SECONDS) -> None:
        """Start the server and return when every model is ready.

        Raises:
            PortError: a port is taken.
            ServerError: there is no Triton server on this machine or no such repository, a model
                failed to load, or `timeout` seconds passed.
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
            self._wait_until_ready(timeout)
        except BaseException:  # an interrupt too must leave nothing behind
            self.stop()
            raise

    def _spawn(self, installation: Installation) -> None:
        folder = _unquoted_temporary_folder()
        server_guard.remove_stale(folder)
        self._run_folder = Path(tempfile.mkdtemp(prefix=server_guard.PREFIX, dir=folder))
        log = self.log or self._run_folder / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log.open("w+b")
        guard = [
            sys.executable,
            "-I",
            server_guard.__file__,
            str(os.getpid()),
            str(self._run_folder),
        ]
        self._guard = subprocess.Popen(
            [*guard, *self._command(installation, self._run_folder)],
            env=installation.environment(self._run_folder),
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

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            if not self.alive:
                check_ports(self.host, self.ports)  # another program was faster
                raise ServerError(f"the Triton server did not start:\n{self._failure()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the Triton server was not ready after {timeout:.0f} seconds; the end of its "
                    f"log:\n{self.log_tail()}"
                )
            time.sleep(0.05)

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

    def stop(self) -> None:
        """Stop the server and everything it started, within 3 seconds; twice does no harm."""
        guard, run_folder = self._guard, self._run_folder
        if guard is not None and guard.stdin is not None and guard.stdout is not None:
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
        self.pid, self._run_folder = 0, None

    def wait(self) -> NoReturn:
        """Wait for the server's end, which is an error unless someone calls `stop()`.

        Raises:
            ServerError: the server died by itself.
        """
        cause = self.cause_of_death()
        raise ServerError(f"the Triton server died ({cause}); its last words:\n{self.log_tail()}")

    def cause_of_death(self) -> str:
        """How the server ended, such as "signal 9"; waits until it has."""
        assert self._guard is not None, "not started"
        status = self._guard.wait()
        return f"signal {status - 128}" if status > 128 else f"exit status {status}"

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
        start = max(0, size - 1_000_000)
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


def _is_dead(process: int) -> bool:
    """Whether a process has ended, if need be without its parent's knowing yet."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def _unquoted_temporary_folder() -> Path:
    """A folder for temporary files whose path a shell takes for one word."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if re.fullmatch(r"[\w./+-]+", candidate, re.ASCII) and os.access(candidate, os.W_OK):
            return Path(candidate)
    raise ServerError(
        f"Triton needs a folder for temporary files without spaces in its path, and neither "
        f"{tempfile.gettempdir()} nor /tmp will do; set TMPDIR to one"
    )


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the command once; more signals must not disturb the clean-up."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _serve(server: TritonServer) -> None:
    started = time.monotonic()
    print(f"starting Triton on {server.repository} ...", flush=True)
    server.start()
    print(f"ready after {time.monotonic() - started:.1f} s (process {server.pid})")
    print(f"  HTTP     {server.http_url}")
    print(f"  gRPC     {server.grpc_url}")
    print(f"  metrics  {server.metrics_url}")
    if server.log is not None:
        print(f"  log      {server.log}")
    print("Ctrl-C stops it.", flush=True)
    server.wait()


def main(arguments: list[str] | None = None) -> int:
    """Serve a repository in the foreground until a signal comes; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m llava_triton.server", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="model repository to serve")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--log", type=Path, help="file for the output of the server and models")
    server = TritonServer(**vars(parser.parse_args(arguments)))
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        _serve(server)
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
    except (ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        server.stop()
    print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
