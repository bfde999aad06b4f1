"""The session adapter as a child process, in the container and beside `llava-triton serve`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

from llava_triton.server.child import start_child
from llava_triton.server.server_error import ServerError


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
    """`python -m llava_sagemaker.adapter`. It says 503 while no Triton serves.

    Args:
        host, port: where it listens.
        triton: `host:port` of Triton's gRPC.
        triton_metrics: `host:port` of Triton's metrics.
        repository: the model repository that Triton serves.
    """

    def __init__(
        self, host: str, port: int, triton: str, triton_metrics: str, repository: Path
    ) -> None:
        self._command = [sys.executable, "-m", "llava_sagemaker.adapter"]
        self._command += ["--host", host, "--port", str(port)]
        self._command += ["--triton", triton, "--triton-metrics", triton_metrics]
        self._command += ["--repository", str(repository)]
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
