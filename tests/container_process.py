"""The container's entry point as a child process, and requests to it, for tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from llava_triton.server.triton_server import free_ports

PATIENCE_SECONDS = 300.0
SESSION = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION = "X-Amzn-SageMaker-Closed-Session-Id"


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error."""
        return str(self.json["error"]["code"])

    @property
    def new_session(self) -> str:
        """The ID of the session that was opened."""
        return self.headers[NEW_SESSION].partition(";")[0]


class Instance:
    """What answers /ping, /metrics and /invocations on a local port."""

    port: int

    def ping(self) -> int:
        """Status of /ping; 0 where nobody answers."""
        try:
            return self.request("GET", "/ping").status
        except (OSError, http.client.HTTPException):
            return 0

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """One request, its whole answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, body or None, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def invoke(
        self,
        body: bytes | dict[str, Any],
        session: str | None = None,
        content_type: str = "application/json",
        accept: str | None = None,
    ) -> Answer:
        """POST /invocations."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": content_type}
        headers |= {SESSION: session} if session else {}
        headers |= {"Accept": accept} if accept else {}
        return self.request("POST", "/invocations", data, headers)

    def events(self, body: dict[str, Any], session: str) -> Iterator[dict[str, Any]]:
        """A streamed answer's events as they come; the connection's end ends them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            SESSION: session,
        }
        try:
            connection.request("POST", "/invocations", json.dumps(body).encode(), headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            while line := response.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        finally:
            connection.close()


class Container(Instance):
    """`python -m llava_sagemaker.container` on a free port.

    Args:
        model: what would be /opt/ml/model.
        log: file for what it prints.
        before: a command that starts the entry point, such as `env NAME=value`.
        port: where it is to listen; by default a free one.
    """

    def __init__(
        self, model: Path, log: Path, before: Sequence[str] = (), port: int | None = None
    ) -> None:
        self.port = free_ports(1)[0] if port is None else port
        self._log = log
        command = [*before, sys.executable, "-m", "llava_sagemaker.container"]
        command += ["--model-dir", str(model), "--port", str(self.port)]
        environment = {**os.environ, "AWS_DEFAULT_REGION": "eu-west-1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def output(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def descendants(self, name: str = "") -> list[psutil.Process]:
        """Its processes whose command line contains `name`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def triton_ports(self) -> set[int]:
        """Where the adapter looks for the engines: the ports of their gRPC."""
        found: set[int] = set()
        for adapter in self.descendants("llava_sagemaker.adapter"):
            arguments = adapter.cmdline()
            first = arguments.index("--triton") + 1
            last = next(n for n in range(first, len(arguments)) if arguments[n].startswith("--"))
            found |= {int(each.rpartition(":")[2]) for each in arguments[first:last]}
        return found

    def kill(self, name: str) -> None:
        """kill -9 of the descendant with this name in its command line; of several engines', one
        of them."""
        guards = self.descendants("server_guard")  # theirs contains tritonserver's
        victim = next(each for each in self.descendants(name) if each not in guards)
        victim.kill()

    def shared_memory(self) -> list[Path]:
        """The regions of its Tritons, which run."""
        # Of each one guard, and for a moment what it has forked to become Triton, of the same name.
        folders = {Path(each.cmdline()[4]) for each in self.descendants("server_guard")}
        return [region for each in folders for region in Path("/dev/shm").glob(f"{each.name}*")]

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Return when something holds; fails when the container has ended or after a while."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert self.process.poll() is None, f"the container has ended:\n{self.output}"
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.output}"
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        """Return when /ping says 200."""
        self.wait_until(lambda: self.ping() == 200, "/ping 200")

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        """End it, however it is."""
        children = [] if self.process.poll() is not None else self.descendants()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        psutil.wait_procs(children, timeout=10.0)


def question(text: str, **parameters: Any) -> dict[str, Any]:
    """Triton's own request format."""
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text]}]
    if parameters:
        data = [json.dumps(parameters)]
        inputs.append(
            {"name": "sampling_parameters", "datatype": "BYTES", "shape": [1], "data": data}
        )
    return {"inputs": inputs}


def text_of(answer: Answer) -> str:
    """`text_output` of an answer in Triton's format."""
    assert answer.status == 200, answer.body
    outputs = {output["name"]: output["data"] for output in answer.json["outputs"]}
    return str(outputs["text_output"][0])
