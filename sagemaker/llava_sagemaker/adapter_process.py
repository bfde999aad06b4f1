"""The session adapter as a child process, in the container and beside `llava-triton serve`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence

from llava_triton.server.child import start_child
from llava_triton.server.ports import check_ports
from llava_triton.server.restarts import RESTARTS, RESTARTS_SECONDS, Faults
from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import TritonServer

STOP_SECONDS = 2.0
"""So long the adapter may take to end running turns, where nobody says otherwise."""
FIRST_PAUSE_SECONDS = 1.0
"""Between the adapter's first death and its next start."""
LONGEST_PAUSE_SECONDS = 8.0


def api_key() -> str:
    """What every request must bring: the variable LLAVA_API_KEY; empty: nothing. No option: those
    are for everybody to see.

    Raises:
        ServerError: no header could carry it.
    """
    key = os.environ.get("LLAVA_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", key):
        raise ServerError(
            "LLAVA_API_KEY must be of printable ASCII without spaces: it is compared with a header"
        )
    return key


class AdapterProcess:
    """`python -m llava_sagemaker.adapter`. It says 503 while no engine serves.

    Args:
        host, port: where it listens.
        engines: the Tritons behind it.
    """

    def __init__(self, host: str, port: int, engines: Sequence[TritonServer]) -> None:
        self._command = [sys.executable, "-m", "llava_sagemaker.adapter"]
        self._command += ["--host", host, "--port", str(port)]
        self._command += ["--triton", *(engine.grpc_address for engine in engines)]
        self._command += ["--triton-metrics", *(engine.metrics_address for engine in engines)]
        self._command += ["--repository", str(engines[0].repository)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns at once."""
        self._process = start_child(self._command)

    def exit_status(self) -> int | None:
        """With which it has ended by itself; None while it runs, or where it was not started."""
        return None if self._process is None else self._process.poll()

    def stop(self, patience: float) -> None:
        """Let it end its running turns, for at most so many seconds; it takes no new ones."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        self._process.wait()
        self._process = None


class KeptAdapter:
    """The session adapter in front of engines, started again when it dies.

    Its sessions are the engines', so they outlive it. What dies too often ends what is served.
    Before it is started again there is a pause, which doubles: what it died of may pass.

    Args:
        host, port: where it listens.
        engines: the Tritons behind it.
        restarts: how often it is started again in ten minutes.
    """

    name = "OpenAI"

    def __init__(
        self, host: str, port: int, engines: Sequence[TritonServer], restarts: int = RESTARTS
    ) -> None:
        self.host = host
        self._port = port
        self._engines = engines
        self._restarts = restarts
        self._faults = Faults()
        self._start_at: float | None = None
        """On time.monotonic's clock, where it has died."""
        self._process = AdapterProcess(host, port, engines)

    @property
    def url(self) -> str:
        """For OpenAI's clients."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self._port}/v1"

    def start(self) -> None:
        """Start it; it says 503 until an engine serves.

        Raises:
            PortError: its port is taken, or is one of an engine's.
        """
        for engine in self._engines:
            same = engine.ports if self.host == engine.host else {}
            check_ports(self.host, {**same, "openai": self._port})
        self._process.start()

    def look(self) -> None:
        """Start it again where it has died.

        Raises:
            ServerError: it has died too often.
        """
        status = self._process.exit_status()
        if status is None:
            return
        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self._start_at = None
                self._process.start()
            return
        died = f"the session adapter has died (exit status {status})"
        times = self._faults.one_more()
        if times > self._restarts:
            minutes = RESTARTS_SECONDS / 60
            raise ServerError(f"{died}, {times} times in {minutes:.0f} minutes; see above why")
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (times - 1), LONGEST_PAUSE_SECONDS)
        self._start_at = time.monotonic() + pause
        print(f"{died}: starting it again in {pause:.0f} s; Triton's sessions go on", flush=True)

    def stop(self, patience: float = STOP_SECONDS) -> None:
        """End it.

        Args:
            patience: seconds that running turns may take.
        """
        self._process.stop(patience)
