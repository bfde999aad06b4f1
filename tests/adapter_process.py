"""The session adapter as a child process, for tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_triton.server.triton_server import TritonServer, free_ports
from tests.container_process import Instance

PATIENCE_SECONDS = 60.0


class Adapter(Instance):
    """`python -m llava_sagemaker.adapter` as a child process.

    Args:
        server: what it stands in front of.
        repository: of the server.
        others: more servers of the same.
        environment: what it is told beside.
    """

    def __init__(
        self,
        server: TritonServer,
        repository: Path,
        others: Sequence[TritonServer] = (),
        **environment: str,
    ) -> None:
        (self.port,) = free_ports(1)
        engines = [server, *others]
        command = [sys.executable, "-m", "llava_sagemaker.adapter", "--port", str(self.port)]
        command += ["--triton", *(each.grpc_address for each in engines)]
        command += ["--triton-metrics", *(each.metrics_address for each in engines)]
        command += ["--repository", str(repository)]
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
        """A number of /metrics, by its name and labels as they are written there; of all engines
        together, unless the labels say of which."""
        return number_on(self.request("GET", "/metrics").body.decode(), name)


def number_on(page: str, name: str) -> float:
    """See `Adapter.metric`; 0 where there is none."""
    if "engine=" not in name:
        page = re.sub(r',?engine="\d+"\}', "}", page).replace("{}", "")
    return sum(map(float, re.findall(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)))
