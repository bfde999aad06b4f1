"""Whole conversations through boto3 and a local SageMaker endpoint of two instances."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError

from demo.shapes import draw, random_scene
from llava_triton.client import ErrorCode, Session, SessionError
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.adapter_process import number_on
from tests.conftest import ROOT
from tests.container_process import question

PICTURE = (ROOT / "examples" / "pictures" / "five-shapes.png").read_bytes()
QUESTIONS = ("How many shapes are there?", "What colour is the circle?", "Describe the picture.")
PATIENCE_SECONDS = 300.0
SESSIONS = 40
LONG: dict[str, Any] = {"max_tokens": 800, "ignore_eos": True}


class LocalEndpoint:
    """`python -m llava_sagemaker.local` as a child process."""

    def __init__(self, repository: Path, folder: Path) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._output = folder / "output"
        command = [sys.executable, "-m", "llava_sagemaker.local", "--instances", "2"]
        command += ["--repository", str(repository), "--port", str(self.port)]
        command += ["--logs", str(folder / "logs")]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def containers(self) -> dict[int, psutil.Process]:
        """The instances' entry points by their ports."""
        found = {}
        for process in psutil.Process(self.process.pid).children():
            line = process.cmdline()
            if "llava_sagemaker.container" in line:
                found[int(line[line.index("--port") + 1])] = process
        return found

    def metric(self, port: int, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as page:
            return number_on(page.read().decode(), name)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(45.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def endpoint(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalEndpoint]:
    endpoint = LocalEndpoint(demo_repository, tmp_path_factory.mktemp("local endpoint"))
    try:
        endpoint.wait_until(lambda: "Ctrl-C stops it" in endpoint.output)
        yield endpoint
    finally:
        endpoint.stop()


@pytest.fixture(scope="module")
def runtime(endpoint: LocalEndpoint) -> Any:
    """The unchanged boto3 client."""
    config = Config(
        signature_version=UNSIGNED, retries={"total_max_attempts": 1}, read_timeout=90.0
    )
    return boto3.client(
        "sagemaker-runtime", region_name="local", endpoint_url=endpoint.url, config=config
    )


def url(endpoint: LocalEndpoint) -> str:
    return f"sagemaker://local?endpoint_url={endpoint.url}"


def told(
    runtime: Any, body: bytes | dict[str, Any], session: str | None = None, **more: Any
) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {} if session is None else {"SessionId": session}
    arguments = {"EndpointName": "local", "ContentType": "application/json", "Body": data}
    return runtime.invoke_endpoint(**{**arguments, **named, **more})


def refused(call: Callable[[], Any]) -> Any:
    with pytest.raises(ClientError) as error:
        call()
    return error.value.response


def answers_over_grpc(server: TritonServer, picture: bytes) -> list[str]:
    with Session.open(server.grpc_url, image=picture) as session:
        return [session.ask(text).text for text in QUESTIONS]


def test_a_conversation(endpoint: LocalEndpoint, server: TritonServer) -> None:
    expected = answers_over_grpc(server, PICTURE)
    with Session.open(url(endpoint), image=PICTURE) as session:
        whole = [session.ask(text) for text in QUESTIONS]
    assert [answer.text for answer in whole] == expected
    assert whole[1].num_cached_tokens >= whole[0].num_input_tokens
    with Session.open(url(endpoint), image=PICTURE) as session:
        streamed = []
        for text in QUESTIONS:
            stream = session.stream(text)
            pieces = list(stream)
            assert len(pieces) > 1
            streamed.append("".join(pieces))
            assert stream.answer.text == streamed[-1]
    assert streamed == expected


def test_boto3_alone(runtime: Any, server: TritonServer) -> None:
    expected = answers_over_grpc(server, PICTURE)
    opened = told(runtime, PICTURE, "NEW_SESSION", ContentType="image/png")
    session, _, expires = opened["NewSessionId"].partition("; Expires=")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", expires)
    assert opened["InvokedProductionVariant"] == "AllTraffic"
    asked = {"messages": [{"role": "user", "content": QUESTIONS[0]}]}
    answer = json.loads(told(runtime, asked, session)["Body"].read())
    assert answer["choices"][0]["message"]["content"] == expected[0]
    streamed = runtime.invoke_endpoint_with_response_stream(
        EndpointName="local",
        SessionId=session,
        ContentType="application/json",
        Body=json.dumps({"messages": [{"role": "user", "content": QUESTIONS[1]}], "stream": True}),
    )
    assert streamed["ContentType"].startswith("text/event-stream")
    data = b"".join(event["PayloadPart"]["Bytes"] for event in streamed["Body"]).decode()
    lines = [line[6:] for line in data.split("\n") if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == expected[1]
    closed = told(runtime, {"requestType": "CLOSE"}, session)
    assert closed["ClosedSessionId"] == session


def test_the_example(endpoint: LocalEndpoint) -> None:
    example = str(ROOT / "examples" / "sagemaker_boto3.py")
    command = [sys.executable, example, "local", endpoint.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first, usage, second, closed = done.stdout.splitlines()
    assert "five" in first
    assert "cached_tokens" in usage
    assert len(second) > 20
    assert closed.startswith("closed: ")


def test_the_commands_chat(endpoint: LocalEndpoint, server: TritonServer, tmp_path: Path) -> None:
    picture = tmp_path / "a picture.png"
    picture.write_bytes(PICTURE)
    command = [sys.executable, "-m", "llava_sagemaker.deploy", "chat", "local"]
    command += ["--image", str(picture), "--region", "eu-west-1"]
    done = subprocess.run(
        command,
        input="\n".join([*QUESTIONS, "", ""]),
        env=os.environ
        | {"AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.url}
        | {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = answers_over_grpc(server, PICTURE)
    assert [part for part in re.split(r"you:? ?:? ", done.stdout) if part][: len(expected)] == [
        f"{answer}\n" for answer in expected
    ]


def test_forty_sessions_stay_on_their_instances(
    endpoint: LocalEndpoint, server: TritonServer
) -> None:
    scenes = [random_scene(random.Random(f"sagemaker {number}")) for number in range(SESSIONS)]
    pictures = []
    for scene in scenes:
        buffer = io.BytesIO()
        draw(scene, 120).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    ports = list(endpoint.containers())
    counters = (
        "llava_sessions_opened_total",
        'llava_adapter_requests_total{kind="triton",outcome="ok"}',
    )
    before = {port: [endpoint.metric(port, name) for name in counters] for port in ports}

    def hold(picture: bytes) -> list[str]:
        with Session.open(url(endpoint), image=picture) as session:
            return [session.ask(text).text for text in QUESTIONS]

    with ThreadPoolExecutor(SESSIONS) as pool:
        given = list(pool.map(hold, pictures))
    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda picture: answers_over_grpc(server, picture), pictures))
    assert given == expected
    assert len({answers[-1] for answers in given}) > 30  # a mixed-up picture would be seen
    after = {port: [endpoint.metric(port, name) for name in counters] for port in ports}
    opened = [after[port][0] - before[port][0] for port in ports]
    asked = [after[port][1] - before[port][1] for port in ports]
    # Opening and every question went to the same instance; /ping opens sessions, too.
    assert sum(asked) == SESSIONS * (1 + len(QUESTIONS))
    assert all(count % (1 + len(QUESTIONS)) == 0 for count in asked)
    assert all(count >= SESSIONS / 4 for count in opened)


def test_limits_and_errors(runtime: Any) -> None:
    too_large = refused(lambda: told(runtime, b"x" * (6 * 1024 * 1024 + 1)))
    assert too_large["Error"]["Code"] == "ValidationError"
    assert "6291456" in too_large["Error"]["Message"]
    largest = refused(lambda: told(runtime, b"x" * (6 * 1024 * 1024), ContentType="image/png"))
    assert largest["Error"]["Code"] == "ModelError"
    for session in ("bad id", "-x", "x" * 257):
        assert refused(lambda: told(runtime, {}, session))["Error"]["Code"] == "ValidationError"  # noqa: B023
    elsewhere = refused(lambda: runtime.invoke_endpoint(EndpointName="other", Body=b"{}"))
    assert elsewhere["Error"]["Code"] == "ValidationError"
    assert "not found" in elsewhere["Error"]["Message"]
    unknown = refused(lambda: told(runtime, question("?"), "unknown-1"))
    assert unknown["Error"]["Code"] == "ModelError"
    assert unknown["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert unknown["OriginalStatusCode"] == 400
    assert json.loads(unknown["OriginalMessage"])["error"]["code"] == "session_not_found"
    opening = refused(
        lambda: runtime.invoke_endpoint_with_response_stream(
            EndpointName="local", SessionId="NEW_SESSION", Body=b"{}"
        )
    )
    assert opening["Error"]["Code"] == "ValidationError"


def test_the_clients_errors(endpoint: LocalEndpoint) -> None:
    with pytest.raises(SessionError) as error:
        Session.open(url(endpoint), image=b"no picture!")
    assert error.value.code is ErrorCode.INVALID_ARG
    with pytest.raises(SessionError, match="not found"):
        Session.open(f"sagemaker://other?endpoint_url={endpoint.url}")
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(SessionError) as error:
        Session.open(f"sagemaker://local?endpoint_url={nowhere}")
    assert error.value.code is ErrorCode.UNAVAILABLE
    with Session.open(url(endpoint), image=PICTURE) as session:
        text = session.ask(QUESTIONS[0]).text
        for _ in session.stream("Tell me everything.", **LONG):
            break  # left early: the session is where it was
        assert session.ask(QUESTIONS[0]).text
        assert text


def test_an_instance_that_dies_in_mid_stream(
    endpoint: LocalEndpoint, runtime: Any, server: TritonServer
) -> None:
    """The last of this module. Sessions there get a clear error, or come back by replay; others
    notice nothing; a new instance comes."""
    expected = answers_over_grpc(server, PICTURE)
    sessions = [Session.open(url(endpoint), image=PICTURE, replay=True) for _ in range(4)]
    try:
        firsts = [session.ask(QUESTIONS[0]).text for session in sessions]
        assert firsts == [expected[0]] * 4
        plain = told(runtime, PICTURE, "NEW_SESSION", ContentType="image/png")
        victim = plain["NewSessionId"].partition(";")[0]
        stream = runtime.invoke_endpoint_with_response_stream(
            EndpointName="local",
            SessionId=victim,
            ContentType="application/json",
            Accept="text/event-stream",
            Body=json.dumps(question("Tell me everything.", **LONG)),
        )
        events = iter(stream["Body"])
        next(events)
        containers = endpoint.containers()
        active = "llava_adapter_requests_in_flight"
        (port,) = [each for each in containers if endpoint.metric(each, active) == 1]
        containers[port].kill()
        with pytest.raises(EventStreamError, match="broke"):
            list(events)
        # The other instance may be too busy for a moment, while the new one loads beside it.
        endpoint.wait_until(lambda: _opens(runtime))
        # The session is not found there ...
        lost = refused(lambda: told(runtime, question(QUESTIONS[0]), victim))
        assert lost["Error"]["Code"] == "ModelError"
        # ... and those that replay go on as if nothing had happened, wherever they were.
        assert [session.ask(QUESTIONS[1]).text for session in sessions] == [expected[1]] * 4
        gone = refused(lambda: told(runtime, question(QUESTIONS[0]), victim))
        assert json.loads(gone["OriginalMessage"])["error"]["code"] == "session_not_found"
        endpoint.wait_until(
            lambda: (
                len(endpoint.containers()) == 2
                and all(_pings(each) for each in endpoint.containers())
            )
        )
        assert [session.ask(QUESTIONS[2]).text for session in sessions] == [expected[2]] * 4
    finally:
        for session in sessions:
            session.close()


def _opens(runtime: Any) -> bool:
    try:
        opened = told(runtime, {"requestType": "NEW_SESSION"}, "NEW_SESSION")
    except ClientError:
        return False
    session = opened["NewSessionId"].partition(";")[0]
    told(runtime, {"requestType": "CLOSE"}, session)
    return True


def _pings(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
