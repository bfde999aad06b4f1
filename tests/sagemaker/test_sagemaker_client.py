"""The client's SageMaker transport and the local endpoint, with containers that misbehave on
demand: real boto3 and real sockets, but no model."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import uvicorn
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError
from llava_sagemaker.local import runtime as local_runtime
from llava_sagemaker.local.bearer_token import PREFIX, local_token
from llava_sagemaker.local.instances import LocalInstance
from llava_sagemaker.local.runtime import make_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llava_triton.client import ErrorCode, Session, SessionError
from llava_triton.client.sagemaker import messages
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta, FinishReason
from llava_triton.server.triton_server import free_ports

WAIT_SECONDS = 30.0
Behaviour = Callable[[Request], Awaitable[Response]]


class Container(LocalInstance):
    """An instance whose container does what a test says; the session ID tells where it opened."""

    def __init__(self, number: int) -> None:
        super().__init__(number, Path("none"), Path("none"))
        self.in_service = True
        self.ended = False
        self.opened = 0
        self.asked: list[str] = []
        """The session headers of all requests."""
        self.behaviour: Behaviour | None = None
        """Of requests that open no session."""

    def look(self) -> None:
        pass

    def has_ended(self) -> bool:
        return self.ended

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/invocations", self._invoke, methods=["POST"])])

    async def _invoke(self, request: Request) -> Response:
        session = request.headers.get("X-Amzn-SageMaker-Session-Id", "")
        self.asked.append(session)
        if session == "NEW_SESSION":
            self.opened += 1
            expires = "2099-01-01T00:00:00Z"
            told = f"on-{self.number}-number-{self.opened}; Expires={expires}"
            return Response(whole("", "prefilled"), headers={local_runtime._NEW_SESSION: told})
        if self.behaviour is None:
            return Response(whole("yes", "stop"), media_type="application/json")
        return await self.behaviour(request)


def piece(text: str, reason: FinishReason = "") -> dict[str, Any]:
    return ANSWER.to_values(Delta(text, reason, 1, 1, 1, 1.0))


def whole(text: str, reason: FinishReason) -> bytes:
    outputs = [{"name": name, "data": [value]} for name, value in piece(text, reason).items()]
    return json.dumps({"outputs": outputs}).encode()


def events(*pieces: dict[str, Any]) -> bytes:
    return "".join(f"data: {json.dumps(each, ensure_ascii=False)}\n\n" for each in pieces).encode()


def streaming(*parts: bytes | None) -> Behaviour:
    """Streams parts, each of its own; at None the connection breaks."""

    async def send() -> AsyncIterator[bytes]:
        for part in parts:
            if part is None:
                await asyncio.sleep(0.25)  # what was sent must be read before
                raise ConnectionAbortedError("as the test wants it")
            yield part
            await asyncio.sleep(0.005)  # or they would leave as one

    async def behave(request: Request) -> Response:
        return StreamingResponse(send(), media_type="text/event-stream")

    return behave


def answering(status: int, body: bytes) -> Behaviour:
    async def behave(request: Request) -> Response:
        return Response(body, status)

    return behave


@contextmanager
def serving(app: Starlette, port: int) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield
    finally:
        server.force_exit = server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[list[Container], str]]:
    """Two containers, and the URL of the endpoint `stub` in front of them."""
    containers = [Container(1), Container(2)]
    (port,) = free_ports(1)
    with (
        serving(containers[0].app, containers[0].port),
        serving(containers[1].app, containers[1].port),
        serving(make_app("stub", containers), port),
    ):
        yield containers, f"http://127.0.0.1:{port}"


@pytest.fixture
def containers(served: tuple[list[Container], str]) -> Iterator[list[Container]]:
    yield served[0]
    for container in served[0]:
        container.behaviour, container.asked = None, []
        container.in_service, container.ended = True, False


@pytest.fixture
def url(served: tuple[list[Container], str]) -> str:
    return f"sagemaker://stub?endpoint_url={served[1]}"


@pytest.fixture(scope="module")
def boto(served: tuple[list[Container], str]) -> Any:
    config = Config(signature_version=UNSIGNED, retries={"total_max_attempts": 1})
    return boto3.client(
        "sagemaker-runtime", region_name="local", endpoint_url=served[1], config=config
    )


def all_behave(containers: list[Container], behaviour: Behaviour | None) -> None:
    for container in containers:
        container.behaviour = behaviour


# The endpoint, through boto3 alone.


def test_parts_of_any_size_arrive_whole(containers: list[Container], boto: Any) -> None:
    parts = [random.Random(1).randbytes(size) for size in (1, 5_000_000, 100)]
    all_behave(containers, streaming(*parts))
    told = boto.invoke_endpoint_with_response_stream(EndpointName="stub", Body=b"{}")
    assert told["ContentType"].startswith("text/event-stream")
    assert told["InvokedProductionVariant"] == "AllTraffic"
    # What the container wrote at once is one event: some clients read no event over two.
    assert [event["PayloadPart"]["Bytes"] for event in told["Body"]] == parts


def test_headers_pass_both_ways(containers: list[Container], boto: Any) -> None:
    seen: dict[str, str] = {}

    async def behave(request: Request) -> Response:
        seen.update(request.headers)
        return Response(b"{}", headers={"X-Amzn-SageMaker-Custom-Attributes": "back"})

    all_behave(containers, behave)
    common = {"EndpointName": "stub", "Body": b"{}", "ContentType": "text/plain"}
    more = {"Accept": "text/event-stream", "CustomAttributes": "there", "InferenceId": "id 1"}
    for call, operation in (
        (boto.invoke_endpoint, "InvokeEndpoint"),
        (boto.invoke_endpoint_with_response_stream, "InvokeEndpointWithResponseStream"),
    ):
        seen.clear()
        assert call(**common, **more)["CustomAttributes"] == "back"
        assert seen["x-amzn-sagemaker-forwarded-api"] == operation
        assert seen["content-type"] == "text/plain"
        assert seen["accept"] == "text/event-stream"
        assert seen["x-amzn-sagemaker-custom-attributes"] == "there"
        assert seen["x-amzn-sagemaker-inference-id"] == "id 1"


def test_a_container_that_breaks_off_is_an_error_event(
    containers: list[Container], boto: Any
) -> None:
    all_behave(containers, streaming(b"one", None))
    told = boto.invoke_endpoint_with_response_stream(EndpointName="stub", Body=b"{}")
    given = iter(told["Body"])
    assert next(given) == {"PayloadPart": {"Bytes": b"one"}}
    with pytest.raises(EventStreamError) as caught:
        next(given)
    assert caught.value.response["Error"]["Code"] == "ModelStreamError"


def test_an_answer_that_takes_too_long(
    containers: list[Container], boto: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_runtime, "ANSWER_SECONDS", 0.2)
    gone = []

    async def behave(request: Request) -> Response:
        gone.append(await request.is_disconnected())
        await asyncio.Event().wait()
        raise AssertionError

    all_behave(containers, behave)
    for call in (boto.invoke_endpoint, boto.invoke_endpoint_with_response_stream):
        with pytest.raises(ClientError) as caught:
            call(EndpointName="stub", Body=b"{}")
        assert caught.value.response["Error"]["Code"] == "ModelError"
        assert caught.value.response["OriginalStatusCode"] == 0
    with Session.open(url, replay=True) as session:
        asked = len(gone)
        with pytest.raises(SessionError, match="timed out") as refused:
            session.ask("What?")
        assert refused.value.code is ErrorCode.UNAVAILABLE
        assert len(gone) == asked + 1  # asking again would take as long
        all_behave(containers, None)


# The OpenAI path.


def post_chat(served_at: str, token: str, endpoint: str = "stub", **headers: str) -> Any:
    connection = http.client.HTTPConnection(served_at.removeprefix("http://"), timeout=60.0)
    path = f"/endpoints/{endpoint}/openai/v1/chat/completions"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request("POST", path, b"{}", {"Authorization": token, **named})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("status", [200, 404, 503])
def test_the_containers_answer_passes_as_it_is(
    containers: list[Container], served: tuple[list[Container], str], status: int
) -> None:
    all_behave(containers, answering(status, b'{"error": {}}'))
    answered, headers, body = post_chat(served[1], f"Bearer {local_token()}")
    assert (answered, body) == (status, b'{"error": {}}')
    all_behave(containers, streaming(b"data: 1\n\n", b"data: [DONE]\n\n"))
    _, headers, body = post_chat(served[1], f"Bearer {local_token()}")
    assert headers["content-type"].startswith("text/event-stream")
    assert body == b"data: 1\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize(
    "token", ["", "Bearer", "Bearer none", f"Basic {local_token()}", f"Bearer {PREFIX}bm9uZQ=="]
)
def test_tokens_of_another_form(
    containers: list[Container], served: tuple[list[Container], str], token: str
) -> None:
    status, headers, _ = post_chat(served[1], token)
    assert (status, headers["x-amzn-ErrorType"]) == (403, "AccessDeniedException")
    assert not any(container.asked for container in containers)


def test_no_such_endpoint_and_no_new_session(served: tuple[list[Container], str]) -> None:
    token = f"Bearer {local_token()}"
    assert post_chat(served[1], token, "other")[0] == 400
    assert post_chat(served[1], token, X_Amzn_SageMaker_Session_Id="NEW_SESSION")[0] == 400


# Sticky routing.


def test_sessions_that_come_one_by_one_spread(containers: list[Container], url: str) -> None:
    sessions = [Session.open(url) for _ in range(4)]
    assert [container.asked for container in containers] == [["NEW_SESSION"] * 2] * 2
    for session in sessions:
        session.close()


def test_a_session_stays_where_it_is_while_a_ping_is_late(
    containers: list[Container], url: str
) -> None:
    with Session.open(url) as session:
        home = containers[int(str(session.id).split("-")[1]) - 1]
        home.in_service = False
        assert session.ask("What?").text == "yes"
        home.in_service = True
        assert session.ask("What?").text == "yes"
        assert home.asked == ["NEW_SESSION", session.id, session.id]


def test_an_instance_that_has_ended_has_no_sessions(containers: list[Container], url: str) -> None:
    with Session.open(url) as session:
        number = int(str(session.id).split("-")[1])
        home, other = containers[number - 1], containers[2 - number]
        home.ended, home.in_service = True, False
        session.ask("What?")
        assert other.asked == [session.id]
        for container in containers:  # the session's home is the other one now
            container.ended, container.in_service = True, False
        with pytest.raises(SessionError, match="no instance") as caught:
            session.ask("What?")
        assert caught.value.code is ErrorCode.UNAVAILABLE


# The client.


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_a_streamed_answer_however_it_is_cut(
    containers: list[Container], url: str, cut: int
) -> None:
    data = b": a comment\n\n" + events(piece("é "), piece("漢字"), piece("!", "stop"))
    all_behave(containers, streaming(*(data[at : at + cut] for at in range(0, len(data), cut))))
    with Session.open(url) as session:
        stream = session.stream("What?")
        assert list(stream) == ["é ", "漢字", "!"]
        assert stream.answer.finish_reason == "stop"
        all_behave(containers, None)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_messages_of_server_sent_events(line_end: bytes) -> None:
    lines = [b"event: x", b"data: 1", b"", b"data:2", b"", b"data: 3"]
    data = line_end.join(lines)
    for cut in range(1, len(data)):
        # The last has no line's end: it is not complete.
        assert list(messages(iter([data[:cut], data[cut:]]))) == [b"1", b"2"]


def test_a_stream_that_breaks_off_is_replayed(containers: list[Container], url: str) -> None:
    all_behave(containers, streaming(events(piece("a "), piece("red")), None))
    with Session.open(url) as session, pytest.raises(SessionError, match="broke") as caught:
        list(session.stream("What?"))
    assert caught.value.code is ErrorCode.UNAVAILABLE

    async def first_breaks(request: Request) -> Response:
        again = streaming(events(piece("a re"), piece("d square", "stop")))
        all_behave(containers, again)
        return await streaming(events(piece("a "), piece("red")), None)(request)

    all_behave(containers, first_breaks)
    with Session.open(url, replay=True) as session:
        assert list(session.stream("What?")) == ["a ", "red", " square"]
        all_behave(containers, None)


def test_a_stream_that_ends_without_its_end(containers: list[Container], url: str) -> None:
    all_behave(containers, streaming(events(piece("a "))))
    with Session.open(url) as session:
        with pytest.raises(SessionError, match="before its end"):
            list(session.stream("What?"))
        all_behave(containers, None)


def test_leaving_a_stream_ends_the_containers_answer(containers: list[Container], url: str) -> None:
    left = threading.Event()

    async def send() -> AsyncIterator[bytes]:
        try:
            yield events(piece("a "))
            await asyncio.Event().wait()
        finally:
            left.set()

    async def behave(request: Request) -> Response:
        return StreamingResponse(send())

    all_behave(containers, behave)
    with Session.open(url) as session:
        for _ in session.stream("What?"):
            break
        assert left.wait(WAIT_SECONDS)
        all_behave(containers, None)


def refusal(code: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": "because"}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "code", "sentence"),
    [
        (400, refusal("session_not_found"), ErrorCode.NOT_FOUND, "because"),
        (400, refusal("invalid_request"), ErrorCode.INVALID_ARG, "because"),
        (400, refusal("image_invalid"), ErrorCode.INVALID_ARG, "because"),
        (413, refusal("body_too_large"), ErrorCode.INVALID_ARG, "because"),
        (503, refusal("unavailable"), ErrorCode.UNAVAILABLE, "because"),
        (500, refusal("internal"), ErrorCode.INTERNAL, "because"),
        (502, b"<html>", ErrorCode.UNAVAILABLE, "ModelError from the endpoint stub"),
        (404, b"[]", ErrorCode.INVALID_ARG, "ModelError from the endpoint stub"),
        (200, b"<html>", ErrorCode.INTERNAL, "cannot read"),
        (200, b'{"outputs": []}', ErrorCode.INTERNAL, "cannot read"),
    ],
)
def test_what_the_container_says(
    containers: list[Container], url: str, status: int, body: bytes, code: ErrorCode, sentence: str
) -> None:
    all_behave(containers, answering(status, body))
    with Session.open(url) as session:
        for ask in (session.ask, lambda text: list(session.stream(text))):
            if status == 200 and ask != session.ask:
                continue  # a stream holds messages
            with pytest.raises(SessionError, match=sentence) as caught:
                ask("What?")
            assert caught.value.code is code
        all_behave(containers, None)


def test_an_error_in_mid_stream(containers: list[Container], url: str) -> None:
    error = json.loads(refusal("unavailable"))
    all_behave(containers, streaming(events(piece("a "), error)))
    with Session.open(url, replay=True) as session:
        with pytest.raises(SessionError, match="because") as caught:
            list(session.stream("What?"))
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert sum(container.opened for container in containers)
        all_behave(containers, None)


def test_a_turn_that_is_too_large_is_not_sent(containers: list[Container], url: str) -> None:
    with Session.open(url) as session:
        asked = sum(len(container.asked) for container in containers)
        with pytest.raises(SessionError, match="SageMaker takes at most 6,291,456") as caught:
            session.ask("What?", image=b"x" * 6 * 1024 * 1024)
        assert caught.value.code is ErrorCode.INVALID_ARG
        assert sum(len(container.asked) for container in containers) == asked


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("sagemaker://", "give grpc://host:port"),
        ("sagemaker://stub?regoin=x", "says regoin; it may say region and endpoint_url"),
        ("sagemaker://stub?endpoint_url=nonsense", "the endpoint_url is 'nonsense'"),
        ("sagemaker://stub?region=eu-west-1", "Unable to locate credentials"),
        ("sagemaker://stub", "You must specify a region"),
    ],
)
def test_what_cannot_be_asked(
    url: str, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SessionError, match=sentence) as caught:
        Session.open(url)
    assert caught.value.code is ErrorCode.INVALID_ARG


def test_the_server_chooses_the_id(url: str) -> None:
    with pytest.raises(SessionError, match="leave session_id out"):
        Session.open(url, session_id="mine")


def test_without_boto3() -> None:
    program = (
        "import sys; sys.modules['boto3'] = None\n"
        "from llava_triton.client import Session, SessionError\n"
        "try: Session.open('sagemaker://any')\n"
        "except SessionError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install boto3" in done.stdout


def test_a_tenant_goes_as_a_custom_attribute(containers: list[Container], url: str) -> None:
    seen: list[str | None] = []

    async def behave(request: Request) -> Response:
        seen.append(request.headers.get("x-amzn-sagemaker-custom-attributes"))
        if "text/event-stream" not in request.headers["accept"]:
            return Response(whole("yes", "stop"), media_type="application/json")
        return await streaming(events(piece("yes", "stop")))(request)

    all_behave(containers, behave)
    for tenant, expected in (("alice", "tenant=alice"), (None, None)):
        seen.clear()
        with Session.open(url, tenant=tenant) as session:
            session.ask("Hello?")
            list(session.stream("Hello?"))
        assert seen == [expected] * 3  # the last one closes it
    with pytest.raises(SessionError, match="1 to 128 letters"):
        Session.open(url, tenant="a;b")
