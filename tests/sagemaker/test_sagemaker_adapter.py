"""The session adapter in front of the real Triton, over plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import re
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.http
from starlette.requests import Request

from llava_triton.server.triton_server import TritonServer, free_ports
from tests.adapter_process import Adapter
from tests.conftest import ROOT
from tests.container_process import (
    CLOSED_SESSION,
    NEW_SESSION,
    SESSION,
    question,
    text_of,
)
from tests.triton import inputs

PICTURE = (ROOT / "examples" / "pictures" / "five-shapes.png").read_bytes()
OTHER = (ROOT / "examples" / "pictures" / "dark.png").read_bytes()
QUESTIONS = ("How many shapes are there?", "What colour is the circle?", "Is there a square?")
HEADER = re.compile(r"(?P<id>[a-zA-Z0-9](-*[a-zA-Z0-9])*); Expires=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
PATIENCE_SECONDS = 60.0


@pytest.fixture
def session(adapter: Adapter) -> Iterator[str]:
    """One that has been shown PICTURE."""
    opened = adapter.invoke(PICTURE, "NEW_SESSION", "image/png").new_session
    yield opened
    adapter.invoke({"requestType": "CLOSE"}, opened)


@pytest.fixture(scope="module")
def expected(http_client: tritonclient.http.InferenceServerClient) -> list[str]:
    """The answers to QUESTIONS about PICTURE, straight from Triton."""
    name = uuid.uuid4().hex
    texts = []
    for index, text in enumerate(QUESTIONS):
        images = [PICTURE] if index == 0 else None
        result = http_client.infer(
            "llava",
            inputs(tritonclient.http, text, images),
            sequence_id=name,
            sequence_start=index == 0,
            sequence_end=index == len(QUESTIONS) - 1,
        )
        texts.append(result.as_numpy("text_output")[0].decode())
    return texts


def data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def chat(
    adapter: Adapter, messages: list[dict[str, Any]], session: str | None = None, **more: Any
) -> Any:
    answer = adapter.invoke({"messages": messages, **more}, session)
    assert answer.status == 200, answer.body
    return answer.json


def content(completion: Any) -> str:
    return str(completion["choices"][0]["message"]["content"])


# AWS's session requests.


def test_session_requests(adapter: Adapter, expected: list[str]) -> None:
    opened = adapter.invoke({"requestType": "NEW_SESSION"}, "NEW_SESSION")
    assert opened.status == 200
    match = HEADER.fullmatch(opened.headers[NEW_SESSION])
    assert match is not None
    session = match["id"]
    assert opened.body.decode() == f"Session {session} created"
    shown = adapter.invoke(PICTURE, session, "image/png")
    assert shown.json["finish_reason"] == "prefilled"
    assert text_of(adapter.invoke(question(QUESTIONS[0]), session)) == expected[0]
    closed = adapter.invoke({"requestType": "CLOSE"}, session)
    assert closed.headers[CLOSED_SESSION] == session
    assert closed.body.decode() == f"Session {session} closed"
    again = adapter.invoke({"requestType": "CLOSE"}, session)
    assert (again.status, again.code) == (400, "session_not_found")


def test_opening_with_a_picture_and_a_question(adapter: Adapter, expected: list[str]) -> None:
    body = {"requestType": "NEW_SESSION", "image": data_uri(PICTURE), "text": QUESTIONS[0]}
    opened = adapter.invoke(body)  # by the body alone, too
    assert opened.json["text_output"] == expected[0]
    assert opened.json["session_id"] == opened.new_session
    second = adapter.invoke(question(QUESTIONS[1]), opened.new_session)
    assert text_of(second) == expected[1]
    adapter.invoke({"requestType": "CLOSE"}, opened.new_session)


def test_the_wire_is_that_of_awss_own_servers(
    adapter: Adapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Their package sets the root logger's level when it is imported, for every later test.
    # What caplog sets is set back at the end.
    caplog.set_level(logging.getLogger().level)
    monkeypatch.setenv("SAGEMAKER_ENABLE_STATEFUL_SESSIONS", "true")
    monkeypatch.setenv("SAGEMAKER_SESSIONS_PATH", str(tmp_path))
    from model_hosting_container_standards.sagemaker.sessions import handlers, manager

    manager.init_session_manager_from_env()

    def theirs(handler: Any, session: str | None) -> Any:
        headers = [] if session is None else [(SESSION.lower().encode(), session.encode())]
        return asyncio.run(handler(Request({"type": "http", "headers": headers})))

    their_opened = theirs(handlers.create_session, None)
    opened = adapter.invoke({"requestType": "NEW_SESSION"})
    their_id = their_opened.headers[NEW_SESSION].partition(";")[0]
    assert opened.status == their_opened.status_code
    assert HEADER.fullmatch(their_opened.headers[NEW_SESSION])
    assert HEADER.fullmatch(opened.headers[NEW_SESSION])
    assert len(opened.new_session) == len(their_id)
    assert opened.body.decode().replace(opened.new_session, their_id) == their_opened.body.decode()
    their_closed = theirs(handlers.close_session, their_id)
    closed = adapter.invoke({"requestType": "CLOSE"}, opened.new_session)
    assert closed.status == their_closed.status_code
    assert their_closed.headers[CLOSED_SESSION] == their_id
    assert closed.headers[CLOSED_SESSION] == opened.new_session
    assert closed.body.decode().replace(opened.new_session, their_id) == their_closed.body.decode()


# AWS's LLaVA sample.


def test_the_samples_requests(adapter: Adapter, expected: list[str]) -> None:
    started = adapter.invoke({"type": "start_session", "path": data_uri(PICTURE)})
    session = started.json["session_id"]
    assert started.new_session == session
    for text, answer in zip(QUESTIONS, expected, strict=True):
        prompt = {"type": "send_text_prompt", "session_id": session, "prompt_text": text}
        assert adapter.invoke(prompt).json == {"response_text": answer}
    closed = adapter.invoke({"type": "close_session", "session_id": session})
    assert closed.json == {"success": True}
    assert closed.headers[CLOSED_SESSION] == session
    prompt = {"type": "send_text_prompt", "session_id": session, "prompt_text": "?"}
    assert adapter.invoke(prompt).code == "session_not_found"


# OpenAI's chat completions.


def test_a_conversation_without_a_session(adapter: Adapter, expected: list[str]) -> None:
    messages: list[dict[str, Any]] = []
    for index, (text, answer) in enumerate(zip(QUESTIONS, expected, strict=True)):
        messages.append(user(text, *([PICTURE] if index == 0 else [])))
        completion = chat(adapter, messages)
        assert content(completion) == answer
        assert completion["object"] == "chat.completion"
        assert completion["choices"][0]["finish_reason"] == "stop"
        usage = completion["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        messages.append(said(answer))


def test_pictures_as_clients_write_them(adapter: Adapter, expected: list[str]) -> None:
    url_safe = base64.urlsafe_b64encode(PICTURE).decode().rstrip("=")
    for uri in (
        f"data:image/jpeg;base64,{url_safe}",  # it is a PNG
        f"data:application/octet-stream;base64,{url_safe}",
        f"DATA:image/png;charset=utf-8;base64,{url_safe}",
    ):
        shown = {"type": "image_url", "image_url": {"url": uri, "detail": None}}
        for parts in (
            [shown, {"type": "text", "text": QUESTIONS[0]}],
            [{"type": "text", "text": QUESTIONS[0]}, shown],
        ):
            completion = chat(adapter, [{"role": "user", "content": parts}])
            assert content(completion) == expected[0]
    alone = chat(adapter, [{"role": "user", "content": [shown]}])
    assert content(alone)


def test_a_written_placeholder_stops_no_conversation(
    adapter: Adapter, session: str, expected: list[str]
) -> None:
    asked = user("What does <image> mean?")
    told = chat(adapter, [asked], session, max_tokens=4)
    chat(adapter, [user("And <image><image>?")], session, max_tokens=4)
    whole = [asked, said(f"<image> {content(told)}"), user("<image>", PICTURE)]
    assert chat(adapter, whole, max_tokens=4)["choices"][0]["finish_reason"]


def test_a_session_that_the_client_names(adapter: Adapter, expected: list[str]) -> None:
    messages: list[dict[str, Any]] = []
    cached = 0
    for index, (text, answer) in enumerate(zip(QUESTIONS, expected, strict=True)):
        messages.append(user(text, *([PICTURE] if index == 0 else [])))
        body = json.dumps({"messages": messages}).encode()
        headers = {"Content-Type": "application/json", "X-Session-Id": "a name of mine"}
        completion = adapter.request("POST", "/v1/chat/completions", body, headers).json
        assert content(completion) == answer
        usage = completion["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= cached
        cached = usage["prompt_tokens"]
        messages.append(said(answer))
    name = {"X-Session-Id": "a name of mine"}
    stranger = adapter.request("DELETE", "/v1/sessions", b"", {**name, "X-Llava-Tenant": "eve"})
    assert (stranger.status, stranger.code) == (400, "session_not_found")
    ended = adapter.request("DELETE", "/openai/v1/sessions", b"", name)
    assert ended.json == {"id": "a name of mine", "object": "session", "deleted": True}
    again = adapter.request("DELETE", "/v1/sessions", b"", name)
    assert (again.status, again.code) == (400, "session_not_found")
    unnamed = adapter.request("DELETE", "/v1/sessions")
    assert (unnamed.status, unnamed.code) == (400, "invalid_request")
    # A new conversation begins under the name.
    headers = {"Content-Type": "application/json", **name}
    body = json.dumps({"messages": messages[:1]}).encode()
    told = adapter.request("POST", "/v1/chat/completions", body, headers).json
    assert content(told) == expected[0]
    assert adapter.request("DELETE", "/v1/sessions", b"", name).status == 200


def test_a_conversation_in_a_session(adapter: Adapter, session: str, expected: list[str]) -> None:
    cached = 0
    for text, answer in zip(QUESTIONS, expected, strict=True):
        completion = chat(adapter, [user(text)], session)
        assert content(completion) == answer
        usage = completion["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= cached
        cached = usage["prompt_tokens"]


def test_the_whole_conversation_in_a_session(adapter: Adapter, expected: list[str]) -> None:
    messages = [user(QUESTIONS[0], PICTURE)]
    opened = adapter.invoke({"messages": messages}, "NEW_SESSION")
    session, before = opened.new_session, opened.json["usage"]["prompt_tokens"]
    assert content(opened.json) == expected[0]
    encoded = adapter.metric('llava_image_cache_total{result="miss"}')
    messages += [said(expected[0]), user(QUESTIONS[1])]
    second = chat(adapter, messages, session)
    assert content(second) == expected[1]
    # Only the question was sent: all that was there before it was remembered.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= before
    assert adapter.metric('llava_image_cache_total{result="miss"}') == encoded
    # Something else than what the session has: it becomes that.
    other = [user(QUESTIONS[0], PICTURE), said("Nine."), user(QUESTIONS[1])]
    assert content(chat(adapter, other, session)) == content(chat(adapter, other))
    # A turn of another kind between: the conversation is not what the messages say.
    adapter.invoke(question(QUESTIONS[2]), session)
    messages += [said(expected[1]), user(QUESTIONS[2])]
    assert content(chat(adapter, messages, session)) == expected[2]
    adapter.invoke({"requestType": "CLOSE"}, session)


def events_of(body: bytes) -> list[Any]:
    lines = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_streamed_chat(adapter: Adapter, session: str, expected: list[str]) -> None:
    body = {
        "messages": [user(QUESTIONS[0])],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    streamed = adapter.invoke(body, session)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage = events_of(streamed.body)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == expected[0]
    assert len([text for text in texts if text]) > 1
    assert last["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"] > 0) == ([], True)


def test_logprobs_of_a_chat(adapter: Adapter) -> None:
    messages = [user(QUESTIONS[0], PICTURE)]
    whole = chat(adapter, messages, logprobs=True, top_logprobs=3)
    assert chat(adapter, messages, logprobs=False)["choices"][0]["logprobs"] is None
    told = whole["choices"][0]["logprobs"]["content"]
    assert len(told) == whole["usage"]["completion_tokens"]
    spelled = b"".join(bytes(token["bytes"]) for token in told)
    assert spelled.decode().removeprefix(" ") == content(whole)
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in told)
    assert {len(token["top_logprobs"]) for token in told} == {3}
    body = {"messages": messages, "logprobs": True, "top_logprobs": 3, "stream": True}
    chunks = events_of(adapter.invoke(body).body)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for piece in pieces if piece for token in piece["content"]] == told


def test_structured_chats(adapter: Adapter) -> None:
    schema = {
        "type": "object",
        "properties": {"circles": {"enum": ["Yes.", "No."]}, "sure": {"type": "boolean"}},
        "required": ["circles", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": schema}}
    messages = [user("Is there a red circle?", PICTURE)]
    whole = chat(adapter, messages, response_format=form)
    assert whole["choices"][0]["finish_reason"] == "stop"
    told = json.loads(content(whole))
    assert told["circles"] in ("Yes.", "No.")
    assert isinstance(told["sure"], bool)
    chunks = events_of(
        adapter.invoke({"messages": messages, "response_format": form, "stream": True}).body
    )
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert json.loads("".join(texts)) == told
    colours = ["The shape is red.", "The shape is blue."]
    one = chat(adapter, messages, structured_outputs={"choice": colours})
    assert content(one) in colours
    begun = chat(adapter, messages, response_format={"type": "json_object"}, max_tokens=8)
    assert content(begun).startswith("{")
    assert chat(adapter, messages, response_format={"type": "text"})["choices"]


def test_parameters_of_a_chat(adapter: Adapter, session: str) -> None:
    cut = chat(adapter, [user(QUESTIONS[0])], session, max_completion_tokens=2, temperature=0)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 2
    for _ in range(5):  # on a busy machine the first token may take longer than that, too
        body = {"messages": [user("?")], "max_seconds": 0.2, "max_tokens": 900, "ignore_eos": True}
        told = adapter.invoke(body, session)
        if told.status == 200:
            break
        assert (told.status, told.code) == (503, "unavailable")
    limited = told.json
    assert limited["choices"][0]["finish_reason"] == "length"  # OpenAI knows no time limit
    system = {"role": "system", "content": "Be brief."}
    first = chat(adapter, [system, user(QUESTIONS[0], PICTURE)], seed=1, n=1, user="me")
    merged = chat(adapter, [user(f"Be brief.\n{QUESTIONS[0]}", PICTURE)])
    assert content(first) == content(merged)


# Triton's own requests.


def test_tritons_client(adapter: Adapter, session: str, expected: list[str]) -> None:
    client = tritonclient.http.InferenceServerClient
    outputs = [
        tritonclient.http.InferRequestedOutput(name)
        for name in ("text_output", "num_cached_tokens")
    ]
    body, size = client.generate_request_body(
        inputs(tritonclient.http, QUESTIONS[0]), outputs=outputs
    )
    kind = f"application/vnd.sagemaker-triton.binary+json;json-header-size={size}"
    answer = adapter.invoke(body, session, kind)
    header_size = int(answer.headers["content-type"].rpartition("=")[2])
    result = client.parse_response_body(answer.body, header_length=header_size)
    assert result.as_numpy("text_output")[0].decode() == expected[0]
    assert result.as_numpy("num_cached_tokens")[0] > 0
    ended = {**question(QUESTIONS[1]), "parameters": {"sequence_end": True}}
    last = adapter.invoke(ended, session)
    assert text_of(last) == expected[1]
    assert last.headers[CLOSED_SESSION] == session
    assert adapter.invoke(question("?"), session).code == "session_not_found"


def test_streamed_outputs(adapter: Adapter, session: str, expected: list[str]) -> None:
    pieces = list(adapter.events(question(QUESTIONS[0]), session))
    assert "".join(piece["text_output"] for piece in pieces) == expected[0]
    assert pieces[-1]["finish_reason"] == "stop"
    assert len(pieces) > 2


# What goes wrong.

JSON = "application/json"
TEXT = {"name": "text_output"}
IMAGES = {"name": "image", "datatype": "BYTES", "shape": [300]}
INVALID = (400, "invalid_request")
LOST = (400, "session_not_found")
BINARY = "application/vnd.sagemaker-triton.binary+json"
REFUSED: list[tuple[Any, str | None, str, tuple[int, str], str]] = [
    (b"{", None, JSON, INVALID, "not valid JSON"),
    (b"[" * 100_000, None, JSON, INVALID, "not valid JSON"),
    (b"[1]", None, JSON, INVALID, "no object"),
    (b"", None, JSON, INVALID, "not valid JSON"),
    ({}, None, JSON, INVALID, "none of what is understood"),
    ({"a": 1}, None, JSON, INVALID, "none of what is understood"),
    (b"<xml/>", None, "application/xml", (415, "invalid_request"), "content type"),
    ({"requestType": "OPEN"}, None, JSON, INVALID, "NEW_SESSION, REGENERATE"),
    ({"requestType": "CLOSE"}, None, JSON, INVALID, "names its session"),
    ({"requestType": "CLOSE"}, "unknown-1", JSON, LOST, "unknown"),
    ({"type": "sing"}, None, JSON, INVALID, "start_session"),
    ({"type": "send_text_prompt", "prompt_text": 3}, "a", JSON, INVALID, "prompt_text"),
    ({"type": "send_text_prompt", "prompt_text": "?"}, None, JSON, INVALID, "session_id"),
    (
        {"type": "start_session", "path": "http://127.0.0.1/"},
        None,
        JSON,
        (400, "image_not_allowed"),
        "only https",
    ),
    (
        {"type": "start_session", "path": "https://169.254.169.254/x"},
        None,
        JSON,
        (400, "image_not_allowed"),
        "not on this server's list",
    ),
    ({"type": "start_session", "path": 7}, None, JSON, (400, "image_invalid"), "base64"),
    (b"no picture!", "NEW_SESSION", "image/png", (400, "image_invalid"), "is no picture"),
    (b"", "NEW_SESSION", "image/png", INVALID, "empty"),
    (PICTURE, None, "image/png", INVALID, "needs a session"),
    ({"messages": []}, None, JSON, INVALID, "at least one"),
    ({"messages": [said("Hello")]}, None, JSON, INVALID, "the last message"),
    ({"messages": [said("")]}, None, JSON, INVALID, "the last message"),
    ({"messages": [user("a"), said("b")]}, None, JSON, INVALID, "the last message"),
    ({"messages": [{"role": "tool", "content": ""}]}, None, JSON, INVALID, "'tool'"),
    ({"messages": [{"role": "user", "content": 3}]}, None, JSON, INVALID, "string"),
    ({"messages": [user("")]}, None, JSON, INVALID, "neither text nor a picture"),
    (
        {"messages": [user("a")], "n": 9},
        None,
        JSON,
        INVALID,
        "n must be the number of answers, 1 to 8",
    ),
    ({"messages": [user("a")], "top_logprobs": 3}, None, JSON, INVALID, 'needs "logprobs"'),
    ({"messages": [user("a")], "logprobs": 3}, None, JSON, INVALID, "true or false"),
    (
        {"messages": [user("a")], "logprobs": True, "top_logprobs": 21},
        None,
        JSON,
        INVALID,
        "logprobs is 21; it must be a whole number from 0 to 20",
    ),
    ({"messages": [user("a")], "response_format": {"type": "xml"}}, None, JSON, INVALID, "must be"),
    (
        {"messages": [user("a")], "response_format": {"type": "json_schema", "json_schema": {}}},
        None,
        JSON,
        INVALID,
        "response_format must be",
    ),
    (
        {"messages": [user("a")], "structured_outputs": {"regex": "(a"}},
        None,
        JSON,
        INVALID,
        "structured_outputs cannot be followed: unclosed group",
    ),
    ({"messages": [user("a")], "presence_penalty": 3}, None, JSON, INVALID, "from -2 to 2"),
    ({"messages": [user("a")], "n": True}, None, JSON, INVALID, "n must be the number of"),
    ({"messages": [user("a")], "tools": [{}]}, None, JSON, INVALID, "tools is not"),
    (
        {"messages": [user("a")], "tools": [{}], "unknown": 1, "audio": {}},
        None,
        JSON,
        INVALID,
        "tools, audio are not supported",
    ),
    ({"messages": [user("a")], "max_tokens": 0}, None, JSON, INVALID, "max_tokens is 0"),
    ({"messages": [user("\ud800")], "stop": ["\ud800"]}, "unknown-1", JSON, LOST, "unknown"),
    ({"messages": [user("a", b"xx")]}, None, JSON, (400, "image_invalid"), "is no picture"),
    (question("?"), "unknown-1", JSON, LOST, "unknown"),
    (question("?"), "bad id", JSON, INVALID, "session ID"),
    (question("?"), "a" * 129, JSON, INVALID, "session ID"),
    (question("?", temperature=9), "NEW_SESSION", JSON, INVALID, "temperature is 9"),
    ({"inputs": 3}, None, JSON, INVALID, "inputs must be the question, a string (or Triton"),
    ({"inputs": [{"name": "x"}]}, None, JSON, INVALID, "'x'"),
    (
        {"inputs": [], "outputs": [TEXT, TEXT]},
        None,
        JSON,
        INVALID,
        "'text_output', unknown or twice",
    ),
    ({"inputs": [{**IMAGES, "data": ["x"] * 300}]}, None, JSON, INVALID, "more than 256 elements"),
    (b"{}", None, f'{JSON};"{";" * 2000}', (415, "invalid_request"), "content type"),
    (b"{}", None, f"{JSON}; a*{'9' * 500}*=x", INVALID, "none of what is understood"),
    (b"{}", None, BINARY, INVALID, "json-header-size"),
    (b"{}", None, f"{BINARY};json-header-size=99", INVALID, "json-header-size"),
    (b"{}", None, f"{BINARY};json-header-size=-1", INVALID, "json-header-size"),
]


@pytest.mark.parametrize(
    ("body", "session", "content_type", "outcome", "sentence"),
    REFUSED,
)
def test_a_bad_request(
    adapter: Adapter,
    body: Any,
    session: str | None,
    content_type: str,
    outcome: tuple[int, str],
    sentence: str,
) -> None:
    before = adapter.metric('llava_sessions{state="idle"}')
    refused = adapter.invoke(body, session, content_type)
    assert (refused.status, refused.code) == outcome, refused.body
    assert sentence in refused.json["error"]["message"]
    assert NEW_SESSION not in refused.headers
    adapter.wait_until(lambda: adapter.metric('llava_sessions{state="idle"}') <= before)


def test_a_body_too_large(adapter: Adapter) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", adapter.port, timeout=30.0)
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Length", str(1 << 30))
    connection.endheaders()
    assert connection.getresponse().status == 413  # before any of it was sent
    connection.close()

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * (1 << 20)

    connection = http.client.HTTPConnection("127.0.0.1", adapter.port, timeout=30.0)
    try:
        connection.request("POST", "/invocations", chunks(), {"Content-Type": "image/png"})
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # it hung up before it was told everything
    finally:
        connection.close()
    adapter.wait_until(lambda: adapter.ping() == 200)


@pytest.mark.parametrize(
    "header", [b"X-Amzn-SageMaker-Session-Id: a\x00b", b"X-Y: \x01\r\nbad line"]
)
def test_control_characters(adapter: Adapter, header: bytes) -> None:
    with socket.create_connection(("127.0.0.1", adapter.port), timeout=30.0) as raw:
        raw.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\n"
            + header
            + b"\r\nContent-Length: 2\r\n\r\n{}"
        )
        assert b" 400 " in raw.recv(4096).partition(b"\r\n")[0]
    adapter.wait_until(lambda: adapter.ping() == 200)


def test_a_client_that_leaves_in_the_middle(
    adapter: Adapter, session: str, expected: list[str]
) -> None:
    for streamed in (True, False):
        cancelled = adapter.metric('llava_turns_total{outcome="cancelled"}')
        connection = http.client.HTTPConnection("127.0.0.1", adapter.port, timeout=30.0)
        headers = {SESSION: session, "Content-Type": "application/json"}
        headers |= {"Accept": "text/event-stream"} if streamed else {}
        body = json.dumps(question("?", max_tokens=800, ignore_eos=True)).encode()
        connection.request("POST", "/invocations", body, headers)
        if streamed:
            connection.getresponse().readline()
        else:
            adapter.wait_until(lambda: adapter.metric("llava_adapter_requests_in_flight") == 1)
            # What is asked now is answered later: the turn has reached the engine then.
            assert adapter.invoke(question("?", max_tokens=1)).status == 200
        connection.close()
        adapter.wait_until(
            lambda: adapter.metric('llava_turns_total{outcome="cancelled"}') == cancelled + 1  # noqa: B023
        )
    # The session is where it was.
    assert text_of(adapter.invoke(question(QUESTIONS[0]), session)) == expected[0]


def test_a_client_that_dawdles(adapter: Adapter) -> None:
    """Headers that never end: the connection is closed, others are served meanwhile."""
    with socket.create_connection(("127.0.0.1", adapter.port), timeout=40.0) as slow:
        slow.sendall(b"POST /invocations HTTP/1.1\r\nX: ")
        adapter.wait_until(lambda: adapter.ping() == 200)
        assert slow.recv(4096) == b""


def test_sessions_side_by_side(adapter: Adapter, expected: list[str]) -> None:
    answers: dict[int, list[str]] = {}

    def hold(number: int) -> None:
        opened = adapter.invoke(PICTURE, "NEW_SESSION", "image/png").new_session
        answers[number] = [text_of(adapter.invoke(question(text), opened)) for text in QUESTIONS]
        adapter.invoke({"requestType": "CLOSE"}, opened)

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert answers == dict.fromkeys(range(12), expected)


def test_nothing_is_left(adapter: Adapter) -> None:
    """The last of this module: every test above has closed what it opened."""
    adapter.wait_until(lambda: adapter.metric("llava_adapter_requests_in_flight") == 0)


def test_without_triton(
    server: TritonServer,
    demo_repository: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Nowhere:
        grpc_address = f"127.0.0.1:{free_ports(1)[0]}"
        metrics_address = f"127.0.0.1:{free_ports(1)[0]}"

    adapter = Adapter(Nowhere, demo_repository)  # type: ignore[arg-type]
    try:
        adapter.wait_until(lambda: adapter.ping() == 503)
        assert [adapter.ping() for _ in range(3)] == [503] * 3
        assert capfd.readouterr().err.count("Triton: ") == 1  # SageMaker asks for ever
        refused = adapter.invoke(question("?"), "NEW_SESSION")
        assert (refused.status, refused.code) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert adapter.request("GET", "/metrics").status == 200
    finally:
        adapter.stop()


def test_an_orderly_end(server: TritonServer, demo_repository: Path) -> None:
    adapter = Adapter(server, demo_repository)
    try:
        adapter.wait_until(lambda: adapter.ping() == 200)
        opened = adapter.invoke(PICTURE, "NEW_SESSION", "image/png").new_session
        events = adapter.events(question("?", max_tokens=500, ignore_eos=True), opened)
        pieces = [next(events)]
        adapter.process.send_signal(signal.SIGTERM)
        adapter.wait_until(lambda: adapter.ping() == 0)  # takes no more connections
        pieces += events
        assert pieces[-1]["finish_reason"] == "length"
        assert adapter.process.wait(30.0) == 0
    finally:
        adapter.stop()
