"""OpenAI's paths on the adapter: routes, errors, CORS, API keys; a stub stands for Triton."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapter_process import Adapter
from tests.container_process import Answer
from tests.stub_triton import StubTriton

KEY = "a-key-that-is-long-enough"
PAGE = "https://chat.example.org"
CHAT_PATHS = ("/v1/chat/completions", "/openai/v1/chat/completions", "/invocations")
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}


@pytest.fixture(scope="module")
def guarded(stub_triton: StubTriton, settings_repository: Path) -> Iterator[Adapter]:
    """With an API key, and for a page of another origin."""
    settings = {"LLAVA_API_KEY": KEY, "LLAVA_CORS_ORIGINS": f"{PAGE}, https://other.example"}
    adapter = Adapter(stub_triton, settings_repository, **settings)  # type: ignore[arg-type]
    try:
        adapter.wait_until(lambda: adapter.ping() == 200)
        yield adapter
    finally:
        adapter.stop()


def post(adapter: Adapter, path: str, body: Any, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named = {"Content-Type": "application/json", **named}
    return adapter.request("POST", path, json.dumps(body).encode(), named)


def error_of(answer: Answer) -> dict[str, Any]:
    """An error, which must have OpenAI's shape."""
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    return dict(error)


@pytest.mark.parametrize("path", CHAT_PATHS)
def test_chat_completions(stub_adapter: Adapter, path: str) -> None:
    answer = post(stub_adapter, path, {**HELLO, "model": ""})
    assert answer.status == 200, answer.body
    assert answer.json["object"] == "chat.completion"
    assert answer.json["choices"][0]["message"]["content"] == "Hello!"


@pytest.mark.parametrize("path", CHAT_PATHS)
def test_each_event_is_written_whole(stub_adapter: Adapter, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stub_adapter.port, timeout=60.0)
    body = json.dumps({**HELLO, "stream": True, "stream_options": {"include_usage": True}})
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = list(chunks_of(response))
    connection.close()
    assert len(chunks) > 1
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)
    assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def chunks_of(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The chunks of a body as they were written."""
    raw = response.fp
    while size := int(raw.readline(), 16):
        yield raw.read(size)
        raw.readline()


@pytest.mark.parametrize(
    ("operation", "stream", "streamed"),
    [
        ("InvokeEndpointWithResponseStream", None, True),
        ("InvokeEndpointWithResponseStream", True, True),
        ("InvokeEndpointWithResponseStream", False, False),
        ("InvokeEndpoint", None, False),
    ],
)
def test_sagemakers_streaming_call_implies_a_stream(
    stub_adapter: Adapter, operation: str, stream: bool | None, streamed: bool
) -> None:
    header = {"X_Amzn_SageMaker_Forwarded_Api": operation}
    answer = post(stub_adapter, "/invocations", {**HELLO, "stream": stream}, **header)
    assert (b"[DONE]" in answer.body) is streamed


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_models(stub_adapter: Adapter, prefix: str) -> None:
    (model,) = stub_adapter.request("GET", f"{prefix}/models").json["data"]
    assert model["object"] == "model"
    assert stub_adapter.request("GET", f"{prefix}/models/{model['id']}").json == model
    unknown = stub_adapter.request("GET", f"{prefix}/models/org/other")
    assert (unknown.status, error_of(unknown)["code"]) == (404, "model_not_found")


def test_health_and_version(stub_adapter: Adapter) -> None:
    assert stub_adapter.request("GET", "/health").status == 200
    assert stub_adapter.request("GET", "/version").json["version"][0].isdigit()


def test_what_is_described_is_there(stub_adapter: Adapter) -> None:
    """And answers as tests/clients/test_openapi.py finds out."""
    described = stub_adapter.request("GET", "/openapi.json").json["paths"]
    assert {*CHAT_PATHS, "/v1/models", "/health", "/ping", "/metrics"} <= described.keys()
    for path, operations in described.items():
        for method in operations.keys() - {"parameters"}:
            asked = path.replace("{name}", "llava")
            assert stub_adapter.request(method.upper(), asked, b"{}").status in (200, 400), path


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/chat/completion", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/llava", 405, "method_not_allowed"),
        ("PUT", "/invocations", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_served(
    stub_adapter: Adapter, method: str, path: str, status: int, code: str
) -> None:
    refused = stub_adapter.request(method, path)
    assert (refused.status, error_of(refused)["code"]) == (status, code)
    if status == 405:
        assert refused.headers["allow"]


@pytest.mark.parametrize("path", CHAT_PATHS[:2])
def test_only_chat_completions_are_taken(stub_adapter: Adapter, path: str) -> None:
    for body in ({}, {"requestType": "NEW_SESSION"}, {"inputs": "Hello!"}, {"messages": None}):
        refused = post(stub_adapter, path, body)
        assert (refused.status, error_of(refused)["param"]) == (400, "messages")
    picture = stub_adapter.request("POST", path, b"...", {"Content-Type": "image/png"})
    assert (picture.status, error_of(picture)["code"]) == (415, "invalid_request")


# An API key.


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/metrics", "/nowhere"])
@pytest.mark.parametrize(
    "given", [None, KEY, f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer é"]
)
def test_without_the_key(guarded: Adapter, path: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given.encode().decode("latin-1")}
    refused = guarded.request("GET", path, headers=headers)
    assert (refused.status, error_of(refused)["code"]) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"


def test_with_the_key(guarded: Adapter, stub_triton: StubTriton) -> None:
    seen = len(stub_triton.seen)
    for path in CHAT_PATHS:
        assert post(guarded, path, HELLO).status == 401
    assert len(stub_triton.seen) == seen
    for path in CHAT_PATHS:
        assert post(guarded, path, HELLO, Authorization=f"Bearer {KEY}").status == 200
    assert post(guarded, CHAT_PATHS[0], HELLO, Authorization=f"bearer  {KEY}").status == 200
    assert guarded.request("GET", "/health").status == 200  # load balancers have none


def test_a_key_that_no_header_could_carry(
    stub_triton: StubTriton, settings_repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key = {"LLAVA_API_KEY": "two words"}
    adapter = Adapter(stub_triton, settings_repository, **key)  # type: ignore[arg-type]
    assert adapter.process.wait(60.0) == 1
    assert "LLAVA_API_KEY must be" in capfd.readouterr().err


# Pages of other origins.


def test_cors(guarded: Adapter, stub_adapter: Adapter) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-os"
    allowed = guarded.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    stranger = guarded.request("OPTIONS", "/v1/models", headers={**asked, "Origin": "https://x.y"})
    assert "access-control-allow-origin" not in stranger.headers
    # An answer may be read, a refusal too.
    for key, status in ((KEY, 200), ("wrong", 401)):
        told = post(
            guarded, "/v1/chat/completions", HELLO, Origin=PAGE, Authorization=f"Bearer {key}"
        )
        assert (told.status, told.headers["access-control-allow-origin"]) == (status, PAGE)
    unset = stub_adapter.request("GET", "/v1/models", headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in unset.headers
