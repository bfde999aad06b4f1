"""What a client may send to the adapter: how large, how odd, how slow; a stub stands for Triton."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import gzip
import json
import os
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from llava_sagemaker.adapter import json_body, off_loop, request_reading
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.json_body import JsonReader
from llava_sagemaker.adapter.metrics import AdapterMetrics
from llava_sagemaker.adapter.request_handling import RequestHandler
from llava_sagemaker.adapter.turns import Triton
from starlette.requests import Request as HttpRequest

from tests.adapter_process import Adapter
from tests.container_process import NEW_SESSION, Answer, question
from tests.sagemaker.conftest import SETTINGS
from tests.stub_triton import StubTriton

PICTURE = base64.b64encode(bytes(range(256)) * 8192).decode()  # has + and / in it
INVALID = (400, "invalid_request")


@pytest.fixture
def triton(stub_triton: StubTriton) -> StubTriton:
    return stub_triton


@pytest.fixture
def adapter(stub_adapter: Adapter) -> Adapter:
    return stub_adapter


def chat(text: str, picture: str | None = None) -> bytes:
    """A chat completion; `picture` as JSON writes it between quotation marks."""
    parts = [f'{{"type": "text", "text": {json.dumps(text)}}}']
    if picture is not None:
        parts.append(f'{{"type": "image_url", "image_url": {{"url": "{picture}"}}}}')
    content = ", ".join(parts)
    return f'{{"messages": [{{"role": "user", "content": [{content}]}}]}}'.encode()


# Large bodies that are taken.

DATA_URI = f"data:image/png;base64,{PICTURE}"
LINES = "\n".join(PICTURE[at : at + 76] for at in range(0, len(PICTURE), 76))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (DATA_URI, DATA_URI),
        (DATA_URI.replace("/", "\\/"), DATA_URI),  # as PHP writes it
        (DATA_URI.replace("+", "\\u002B"), DATA_URI),  # as .NET writes it
        (f"data:,{LINES}".replace("\n", "\\r\\n"), f"data:,{LINES}".replace("\n", "\r\n")),
        (f"data:,{PICTURE[:100_000]}", f"data:,{PICTURE[:100_000]}"),
    ],
)
def test_a_large_picture_arrives_as_it_was_meant(
    adapter: Adapter, triton: StubTriton, written: str, meant: str
) -> None:
    for text in ("What is it?", "Ein Esel? \N{HORSE FACE}", 'He said "a\\b", and left'):
        answer = adapter.invoke(chat(text, written))
        assert answer.status == 200, answer.body
        assert answer.json["choices"][0]["message"]["content"] == text
        assert triton.seen[-1].inputs["image"] == [meant.encode()]


def test_each_kind_of_request_takes_large_pictures(adapter: Adapter, triton: StubTriton) -> None:
    raw = os.urandom(3 << 20)
    binary: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1]}
    binary["parameters"] = {"binary_data_size": len(raw) + 4}
    head = json.dumps({**question("?"), "inputs": [*question("?")["inputs"], binary]}).encode()
    kind = f"application/vnd.sagemaker-triton.binary+json;json-header-size={len(head)}"
    as_json = {"name": "image", "datatype": "BYTES", "shape": [2], "data": ["a", PICTURE]}
    for body, session, content_type, images in (
        (raw, "NEW_SESSION", "image/png", [raw]),
        (head + len(raw).to_bytes(4, "little") + raw, None, kind, [raw]),
        ({"inputs": [as_json]}, None, "application/json", [b"a", PICTURE.encode()]),
        ({"requestType": "NEW_SESSION", "image": PICTURE}, None, "", [PICTURE.encode()]),
        ({"type": "start_session", "path": PICTURE}, None, "", [PICTURE.encode()]),
    ):
        answer = adapter.invoke(body, session, content_type)  # type: ignore[arg-type]
        assert answer.status == 200, answer.body
        assert triton.seen[-1].inputs["image"] == images


def test_long_texts_are_taken(adapter: Adapter) -> None:
    commas = "a, b: [c], {d} " * (SETTINGS.max_text_bytes // 16)
    quotes = '"' * (SETTINGS.max_text_bytes // 2)
    for text in (commas, quotes, "\\" * 100_000, "\N{HORSE FACE}" * 60_000, "x" * 200_000):
        answer = adapter.invoke(chat(text))
        assert answer.status == 200, answer.body
        assert answer.json["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("size", [10, 100_000])
def test_encodings_of_json(adapter: Adapter, encoding: str, size: int) -> None:
    body = chat("é" * size).decode().encode(encoding)
    assert adapter.invoke(body).json["choices"][0]["message"]["content"] == "é" * size


# Bodies that are refused.

MEGABYTE = 1 << 20
LISTS = b"[" + b"[]," * (MEGABYTE // 2) + b"0]"
KEYS = b"{" + b",".join(b'"%d":0' % number for number in range(600_000)) + b"}"
LONG = "x" * MEGABYTE
REFUSED: dict[str, tuple[bytes, tuple[int, str], str]] = {
    "lists": (LISTS, INVALID, "brackets"),
    "lists beside a picture": (b'{"a": "%b", "b": %b}' % (PICTURE.encode(), LISTS), INVALID, "bra"),
    "keys": (KEYS, INVALID, "brackets"),
    "strings side by side": (b'"' * 400_000, INVALID, "brackets"),
    "deep": (b'{"a":' * 15_000 + b"0" + b"}" * 15_000, INVALID, "not valid JSON"),
    "numbers": (b"[" + b"1" * 5000 + b"]", INVALID, "not valid JSON"),
    "a large number": (b"1" * (8 * MEGABYTE), INVALID, "besides its pictures"),
    "spaces": (b" " * (8 * MEGABYTE), INVALID, "besides its pictures"),
    "quotation marks": (b'{"a": "%b"}' % (b'\\"' * MEGABYTE), INVALID, "quotation marks"),
    "characters": (chat("\N{HORSE FACE}" * MEGABYTE), INVALID, "besides its pictures"),
    "an open string": (b'{"a": "' + b"x" * MEGABYTE, INVALID, "not valid JSON"),
    "a control character": (chat("").replace(b'""', b'"\n%b"' % LONG.encode()), INVALID, "JSON"),
    "NaN": (b'{"a": NaN, "b": "%b"}' % LONG.encode(), INVALID, "NaN"),
    "Infinity": (b'{"a": "%b", "b": -Infinity}' % LONG.encode(), INVALID, "Infinity"),
    "NaN alone": (b'{"a": NaN}', INVALID, "NaN is no JSON number"),
    "a long name": (b'{"%b": 1}' % LONG.encode(), INVALID, "not valid JSON"),
    "a long text": (chat(LONG), INVALID, f"{MEGABYTE} bytes long"),
    "a long question": (json.dumps(question(LONG)).encode(), INVALID, f"{MEGABYTE} bytes long"),
    "a long parameter": (
        json.dumps({"requestType": "NEW_SESSION", "x": LONG}).encode(),
        INVALID,
        f"{MEGABYTE} bytes long",
    ),
    "a long type": (json.dumps({"type": {"a": LONG}}).encode(), INVALID, "start_session"),
    "long sampling": (
        json.dumps(question("?", stop=[LONG])).encode(),
        INVALID,
        "sampling_parameters is",
    ),
    "not UTF-8": (b'{"messages": "\xff"}', INVALID, "not valid JSON"),
    "not UTF-8, large": (b'{"messages": "\xff%b"}' % LONG.encode(), INVALID, "not valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_refused(adapter: Adapter, triton: StubTriton, name: str) -> None:
    body, outcome, sentence = REFUSED[name]
    before = len(triton.seen)
    refused = adapter.invoke(body)
    assert (refused.status, refused.code) == outcome, refused.body
    assert sentence in refused.json["error"]["message"]
    assert len(refused.body) < 500
    assert len(triton.seen) == before


BINARY = "application/vnd.sagemaker-triton.binary+json"


@pytest.mark.parametrize(
    ("body", "parameters", "sentence"),
    [
        (b"{}", ";json-header-size=2", "inputs must be a list"),
        (b'{"inputs": null}', ";json-header-size=16", "inputs must be a list"),
        (b"{}", ";json-header-size*=utf-8''2", "json-header-size"),
        (b"{}", f";json-header-size={'0' * 30}2", "json-header-size"),
        (
            b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"parameters":'
            b'{"binary_data_size":true}}]}x',
            ";json-header-size=99",
            "binary_data_size",
        ),
    ],
)
def test_binary_requests_that_lack_something(
    adapter: Adapter, body: bytes, parameters: str, sentence: str
) -> None:
    refused = adapter.invoke(body, None, BINARY + parameters)
    assert (refused.status, refused.code) == INVALID, refused.body
    assert sentence in refused.json["error"]["message"]


def test_only_small_bodies_are_read_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"here": [], "elsewhere": []}
    here, loads = threading.current_thread(), json.loads

    def watched(text: Any, **more: Any) -> Any:
        sizes["here" if threading.current_thread() is here else "elsewhere"].append(len(text))
        return loads(text, **more)

    async def read(body: bytes) -> None:
        reader = JsonReader(SETTINGS.max_text_bytes)
        await reader.object(await reader.outline(body))

    monkeypatch.setattr(json, "loads", watched)
    for size in (100, 50_000, 100_000):
        asyncio.run(read(b'{"a": "%b"}' % (b"x" * size)))
        asyncio.run(read(b'{"a": [%b 0]}' % (b"0," * size)))
    assert len(sizes["here"]) >= 3
    assert max(sizes["here"]) <= off_loop.LARGE_BYTES < max(sizes["elsewhere"])


def test_a_long_string_is_never_in_one_piece() -> None:
    reader = JsonReader(SETTINGS.max_text_bytes)

    async def read() -> Any:
        outline = await reader.outline(b'{"a": "%b"}' % (b"0123456789\\/" * MEGABYTE))
        assert len(outline.rest) < 100
        return await reader.object(outline)

    pieces = asyncio.run(read())["a"].pieces
    assert b"".join(pieces) == b"0123456789/" * MEGABYTE
    assert max(map(len, pieces)) <= json_body.PIECE_BYTES


# What is packed.


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_gzip(adapter: Adapter, triton: StubTriton, encoding: str) -> None:
    for picture in (None, DATA_URI):
        body = chat("packed", picture)
        halves = gzip.compress(body[:1000]) + gzip.compress(body[1000:])
        for packed in (gzip.compress(body), halves):
            answer = with_encoding(adapter, packed, encoding)
            assert answer.json["choices"][0]["message"]["content"] == "packed"
    assert triton.seen[-1].inputs["image"] == [DATA_URI.encode()]


@pytest.mark.parametrize(
    ("body", "encoding", "status", "sentence"),
    [
        (zlib.compress(chat("?")), "deflate", 415, "or with gzip"),
        (chat("?"), "br", 415, "or with gzip"),
        (chat("?"), "gzip, gzip", 415, "or with gzip"),
        (chat("?"), "gzip", 400, "not gzip"),
        (b"", "gzip", 400, "cut off"),
        (gzip.compress(chat("?"))[:-1], "gzip", 400, "cut off"),
        (gzip.compress(chat("?")) + b"more", "gzip", 400, "not gzip"),
        (gzip.compress(bytes(64 << 20)), "gzip", 413, "larger than"),
    ],
)
def test_what_is_packed_in_another_way(
    adapter: Adapter, body: bytes, encoding: str, status: int, sentence: str
) -> None:
    refused = with_encoding(adapter, body, encoding)
    assert refused.status == status
    assert sentence in refused.json["error"]["message"]
    assert with_encoding(adapter, chat("?"), "identity").status == 200


def with_encoding(adapter: Adapter, body: bytes, encoding: str) -> Answer:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    return adapter.request("POST", "/invocations", body, headers)


# Headers and trailers.

HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\n"


def answer_to(adapter: Adapter, *sent: bytes) -> bytes:
    """What comes back until the connection ends; empty where it only ends."""
    with socket.create_connection(("127.0.0.1", adapter.port), timeout=60.0) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):
            for data in sent:
                connection.sendall(data)
            while data := connection.recv(65536):
                received += data
        return received


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"X-Long: " + b"a" * 70_000 + b"\r\n",
        HEAD + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 100) for n in range(700)),
        b"POST /invocations?%b HTTP/1.1\r\nHost: x\r\n" % (b"a" * 70_000),
    ],
)
def test_large_headers_are_refused_also_at_once(
    adapter: Adapter, triton: StubTriton, head: bytes
) -> None:
    before = len(triton.seen)
    body = chat("?")
    answer = answer_to(adapter, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 431 "), answer[:200]
    assert len(triton.seen) == before


def test_headers_below_the_limit(adapter: Adapter) -> None:
    headers = {"X-Long": "a" * 60_000, "Content-Type": "application/json"}
    assert adapter.request("POST", "/invocations", chat("?"), headers).status == 200


def chunked(body: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(body), body)


def test_trailers(adapter: Adapter, triton: StubTriton) -> None:
    few = chunked(chat("with trailers")) + b"X-Sum: 1\r\n\r\n"
    last = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert b"with trailers" in answer_to(adapter, few + last)
    before, memory = len(triton.seen), memory_mib(adapter)
    many = (b"X-%d: %b\r\n" % (n, b"a" * 1000) for n in range(32_000))
    one = (b"X-Long: ", *(b"a" * MEGABYTE for _ in range(32)))
    for trailers in (many, one):
        answer = answer_to(adapter, chunked(chat("?")), *trailers)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 "), answer[:200]
    assert len(triton.seen) == before
    assert memory_mib(adapter) < memory + 16


def memory_mib(adapter: Adapter) -> float:
    return float(psutil.Process(adapter.process.pid).memory_info().rss) / MEGABYTE


def test_pipelined_requests(adapter: Adapter) -> None:
    ping = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    last = ping.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert answer_to(adapter, ping * 5 + last).count(b"HTTP/1.1 200 ") == 6
    assert answer_to(adapter, ping * 10_000).count(b"HTTP/1.1 200 ") < 100


# Bodies that do not come.


def test_bodies_that_do_not_come_take_no_place(adapter: Adapter) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(100):  # more than there are places
            connection = socket.create_connection(("127.0.0.1", adapter.port))
            stack.enter_context(connection)
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n" + b"x" * (number % 2))
        in_flight = "llava_adapter_requests_in_flight"
        adapter.wait_until(lambda: adapter.metric(in_flight) == 100)
        assert adapter.invoke(chat("?")).status == 200
        assert adapter.ping() == 200
    adapter.wait_until(lambda: adapter.metric(in_flight) == 0)


def test_requests_that_have_come_take_places(adapter: Adapter, triton: StubTriton) -> None:
    triton.may_answer.clear()
    places = SETTINGS.max_queued_turns + 64
    body = chat("?")
    with contextlib.ExitStack() as stack:
        stack.callback(triton.may_answer.set)
        for _ in range(places):
            connection = socket.create_connection(("127.0.0.1", adapter.port))
            stack.enter_context(connection)
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        in_flight = "llava_adapter_requests_in_flight"
        adapter.wait_until(lambda: adapter.metric(in_flight) == places)
        refused = adapter.invoke(chat("?"))
        assert (refused.status, refused.code) == (503, "unavailable")
    adapter.wait_until(lambda: adapter.metric(in_flight) == 0)


def http_request(messages: list[dict[str, Any]], **headers: str) -> HttpRequest:
    """A request whose body comes as these messages of ASGI; nothing comes behind them."""
    left = iter(messages)

    async def receive() -> dict[str, Any]:
        for message in left:
            return {"type": "http.request", **message}
        await asyncio.Event().wait()
        raise AssertionError

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": named}
    return HttpRequest(scope, receive)


def test_a_body_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_reading, "SILENCE_SECONDS", 0.1)

    async def ask() -> Any:
        async with in_process() as handler:
            return await handler.any_kind(http_request([{"body": b"{", "more_body": True}]))

    answer = asyncio.run(ask())
    assert answer.status_code == 408
    assert b"stopped" in answer.body


def test_small_bodies_have_room_beside_large_ones() -> None:
    room = request_reading.BodyRoom(MEGABYTE)
    with contextlib.ExitStack() as stack:
        for _ in range(request_reading.LARGEST_BODIES):
            stack.enter_context(room.share()).take(MEGABYTE)
        large, small = (stack.enter_context(room.share()) for _ in range(2))
        with pytest.raises(AdapterError, match="too many large bodies"):
            large.take(MEGABYTE)
        small.take(1000)
        with small.parsed(100_000):
            pass
    with room.share() as share:
        share.take(MEGABYTE)  # all was given back


# What is left of a request.


@contextlib.asynccontextmanager
async def in_process() -> AsyncIterator[RequestHandler]:
    """The adapter's handler in the running loop, nobody behind it."""
    triton = Triton("127.0.0.1:1")
    # One engine, which nobody looks for.
    engines: Any = SimpleNamespace(all=[triton], pieces=triton.pieces, whole=triton.whole)
    yield RequestHandler(engines, AdapterMetrics(engines), SETTINGS)
    await triton.close()


def test_a_refused_request_leaves_nothing_to_the_garbage_collector() -> None:
    def requests() -> Iterator[HttpRequest]:
        large = b" " * MEGABYTE
        yield http_request([{"body": large, "more_body": True}] * 64)  # too large
        yield http_request([{"body": large}])  # no JSON
        yield http_request([{"body": b"[" * 80_000}])
        yield http_request([{"body": chat("?")}])  # nobody answers
        yield http_request([{"body": chat("?", "https://example.com/x")}])
        yield http_request([{"body": large}], content_type="application/xml")
        yield http_request([{"body": large}], content_encoding="gzip")
        stream = json.dumps({**json.loads(chat("?")), "stream": True}).encode()
        yield http_request([{"body": stream}])

    async def refuse() -> list[int]:
        async with in_process() as handler:
            return [(await handler.any_kind(http)).status_code for http in requests()]

    asyncio.run(refuse())  # what is made once
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        statuses = asyncio.run(refuse())
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, Exception)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert statuses == [413, 400, 400, 503, 400, 415, 400, 503]
    assert left == []


# Sessions.


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def open_on_picture(adapter: Adapter) -> str:
    opened = adapter.invoke(b"a picture", "NEW_SESSION", "image/png")
    assert opened.status == 200, opened.body
    return opened.new_session


WHOLE: dict[str, Any] = {"messages": [user("Hi"), said("Hi"), user("What is it?")]}


def test_refused_openings_make_nothing_forgotten(adapter: Adapter, triton: StubTriton) -> None:
    session = open_on_picture(adapter)
    assert adapter.invoke({"messages": [user("Hi")]}, session).status == 200
    for _ in range(5 * SETTINGS.max_sessions):
        refused = adapter.invoke(b"no picture", "NEW_SESSION", "image/png")
        assert (refused.status, NEW_SESSION in refused.headers) == (400, False)
    assert adapter.invoke(WHOLE, session).status == 200
    seen = triton.seen[-1]
    assert (seen.session, seen.start, seen.text) == (session, False, "What is it?")


def test_what_was_forgotten_may_have_had_pictures(adapter: Adapter, triton: StubTriton) -> None:
    session = open_on_picture(adapter)
    assert adapter.invoke({"messages": [user("Hi")]}, session).status == 200
    for _ in range(5 * SETTINGS.max_sessions):  # Triton has room for all of them
        open_on_picture(adapter)
    for _ in range(2):
        refused = adapter.invoke(WHOLE, session)
        assert (refused.status, refused.code) == INVALID
        assert "send only the new user message" in refused.json["error"]["message"]
        assert [seen.start for seen in triton.seen if seen.session == session].count(True) == 1
    assert adapter.invoke({"messages": [user("What is it?")]}, session).status == 200


def shown(text: str, *pictures: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:,{picture}"}} for picture in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_chats_that_use_one_session_lose_no_picture_of_one_another(
    adapter: Adapter, triton: StubTriton
) -> None:
    opened = adapter.invoke({"messages": [shown("a", "one")]}, "NEW_SESSION")
    session = opened.new_session
    assert adapter.invoke({"messages": [shown("b", "two")]}, session).status == 200
    # Another chat, which has not seen the second picture.
    lacking = {"messages": [shown("a", "one"), said("a"), user("c")]}
    refused = adapter.invoke(lacking, session)
    assert (refused.status, refused.code) == INVALID
    assert "has a picture" in refused.json["error"]["message"]
    # One with all pictures may say anything else.
    other = [shown("a", "one", "two"), said("x"), user("c")]
    assert adapter.invoke({"messages": other}, session).status == 200
    assert (triton.seen[-1].start, triton.seen[-1].inputs["image"]) == (
        True,
        [b"data:,one", b"data:,two"],
    )


def test_a_refused_turn_leaves_what_is_known_of_its_session(
    adapter: Adapter, triton: StubTriton
) -> None:
    opened = adapter.invoke({"messages": [user("a")]}, "NEW_SESSION")
    session = opened.new_session
    for body in (b"no picture", b"no picture"):
        assert adapter.invoke(body, session, "image/png").status == 400
    following = {"messages": [user("a"), said("a"), user("b")]}
    assert adapter.invoke(following, session).status == 200
    assert (triton.seen[-1].start, triton.seen[-1].text) == (False, "b")


def test_a_session_that_is_being_opened_anew_takes_nothing_else(
    adapter: Adapter, triton: StubTriton
) -> None:
    session = adapter.invoke({"messages": [user("a")]}, "NEW_SESSION").new_session
    answers: list[Answer] = []

    def reopen() -> None:
        messages = [user("x"), said("x"), user("y")]
        answers.append(adapter.invoke({"messages": messages}, session))

    reopening = threading.Thread(target=reopen)
    seen = len(triton.seen)
    check = 1  # whether the session is open
    triton.may_answer.clear()
    try:
        reopening.start()
        adapter.wait_until(lambda: len(triton.seen) == seen + check)
        triton.go_on_once()
        adapter.wait_until(lambda: len(triton.seen) == seen + check + 1)
        assert triton.seen[-1].start
        refused = adapter.invoke(b"a picture", session, "image/png")
        assert (refused.status, refused.code) == (503, "unavailable")
    finally:
        triton.may_answer.set()
        reopening.join()
    assert answers[0].status == 200
    assert adapter.invoke(b"a picture", session, "image/png").status == 200
