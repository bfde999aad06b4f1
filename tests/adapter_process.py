"""The session adapter as a child process, for tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llava_triton.server.triton_server import TritonServer, free_ports
from tests.container_process import Instance

PATIENCE_SECONDS = 60.0


class Adapter(Instance):
    """`python -m llava_sagemaker.adapter` as a child process."""

    def __init__(self, server: TritonServer, repository: Path, **environment: str) -> None:
        (self.port,) = free_ports(1)
        command = [sys.executable, "-m", "llava_sagemaker.adapter", "--port", str(self.port)]
        command += ["--triton", server.grpc_address, "--repository", str(repository)]
        command += ["--triton-metrics", f"127.0.0.1:{server.ports['metrics']}"]
        self.process = subprocess.Popen(command, env={**os.environ, **environment})

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30.0)
        finally:
            self.process.kill()
            self.process.wait()

    def metric(self, name: str) -> float:
        """A number of /metrics, by its name and labels as they are written there."""
        text = self.request("GET", "/metrics").body.decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
