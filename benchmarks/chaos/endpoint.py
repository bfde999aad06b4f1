"""The endpoint that is harmed: local instances with several engines each, and one journal."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import Process, is_running, with_descendants
from llava_triton.server.ports import free_ports

START_SECONDS = 300.0
STOP_SECONDS = 60.0
ANSWER_SECONDS = 70.0
"""A little longer than the endpoint waits for an instance."""
SESSION = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"
RESTARTS = "100000"
"""What dies too often ends an instance; here everything does."""
_STUBS = (
    "language_model",
    "image_encoder",
    "vision_encoder",
    "answer_collector",
    "disconnect_watch",
)


class Told(NamedTuple):
    """What the endpoint answers."""

    status: int
    """Of the instance's container; 0: the endpoint itself has failed."""
    session: str
    """The ID of a session that was opened."""
    text: str
    """The answer, or what is wrong."""


class Endpoint:
    """`python -m llava_sagemaker.local` as a child process.

    Args:
        repository: what it serves.
        logs: folder for what it and its instances print.
        instances: how many.
        engines: of each.
    """

    def __init__(self, repository: Path, logs: Path, instances: int, engines: int) -> None:
        self._repository = repository
        self._logs = logs
        self._instances = instances
        self._engines = engines
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return when all instances serve.

        Raises:
            RuntimeError: it does not start.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "llava_sagemaker.local", "--port", str(self.port)]
        command += ["--repository", str(self._repository), "--logs", str(self._logs)]
        command += ["--instances", str(self._instances)]
        told = {"LLAVA_ENGINES": str(self._engines), "LLAVA_RESTARTS": RESTARTS}
        output = self._logs / "endpoint.log"
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                command, env={**os.environ, **told}, stdout=file, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while "Ctrl-C stops it" not in output.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the endpoint has not started:\n{output.read_text()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def instances(self) -> Iterator[list[Process]]:
        """The processes of each instance that runs, its entry point first."""
        assert self._process is not None
        for process in with_descendants(self._process.pid):
            if process.name == "llava_sagemaker.container":
                yield with_descendants(process.pid)

    def ask(self, body: dict[str, Any], session: str) -> Told:
        """InvokeEndpoint.

        Raises:
            OSError: the endpoint has failed.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        headers = {"Content-Type": "application/json", SESSION: session}
        try:
            connection.request(
                "POST", "/endpoints/local/invocations", json.dumps(body).encode(), headers
            )
            answer = connection.getresponse()
            content = answer.read()
            opened = answer.headers.get(NEW_SESSION, "").partition(";")[0]
        except http.client.HTTPException as error:
            raise OSError(f"the endpoint broke off: {error!r}") from error
        finally:
            connection.close()
        if answer.status != 200:
            told = json.loads(content)
            said = told.get("OriginalMessage") or told.get("Message") or told.get("message")
            return Told(int(told.get("OriginalStatusCode") or 0), "", str(said))
        if content.startswith(b"{"):
            outputs = {each["name"]: each["data"] for each in json.loads(content)["outputs"]}
            return Told(200, opened, str(outputs["text_output"][0]))
        return Told(200, opened, content.decode())


def parts(instance: list[Process]) -> dict[str, list[Process]]:
    """An instance's processes that run, by what they are: model, triton, adapter, instance."""
    found: dict[str, list[Process]] = {"instance": instance[:1]}
    for process in instance[1:]:
        if not is_running(process.pid):
            continue
        if process.name in _STUBS:
            found.setdefault("model", []).append(process)
        elif process.name == "tritonserver":
            found.setdefault("triton", []).append(process)
        elif process.name == "llava_sagemaker.adapter":
            found.setdefault("adapter", []).append(process)
    return found
