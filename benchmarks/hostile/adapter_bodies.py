"""What strangers can send to the session adapter."""

from __future__ import annotations

import base64
import gzip
import json
import resource
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial

from benchmarks.doors import BINARY
from benchmarks.hostile.attack import Play, attack, invoke, raw, side_by_side
from benchmarks.stand import Stand

MB = 1_000_000
REFUSED = r"4\d\d( .*)?|503 unavailable|closed"
HOLD_SECONDS = 6.0
INPUTS = (b"null", b"3", b"[3]", b"[{}]", b"{}", b'"a"')


@attack("A1", right=f"{REFUSED}|took no more", cheap=True)
def trailers(stand: Stand) -> Play:
    """Chunked trailers of 96 MB."""
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    line = b"X-Trailer: " + b"a" * 8000 + b"\r\n"

    def play() -> Counter[str]:
        with raw(stand.adapter_port) as connection:
            try:
                connection.sendall(head)
                for _ in range(96 * MB // len(line)):
                    connection.sendall(line)
            except TimeoutError:
                return Counter({"took no more": 1})
            except OSError:
                return Counter({"closed": 1})
        return Counter({"took all": 1})

    return play


@attack("A2", right=REFUSED)
def refused_bodies(stand: Stand) -> Play:
    """60 bodies of 40 MB that are no JSON."""
    body = b"{" + b" " * 40 * MB
    return lambda: Counter(invoke(stand, body) for _ in range(60))


def _held(stand: Stand, sent: bytes, connections: int) -> Play:
    """Connections that send the same and then nothing."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def play() -> Counter[str]:
        answered: Counter[str] = Counter()
        with ExitStack() as held:
            for _ in range(connections):
                try:
                    connection = held.enter_context(raw(stand.adapter_port))
                    connection.sendall(sent)
                    answered["connected"] += 1
                except OSError:
                    answered["closed"] += 1
            time.sleep(HOLD_SECONDS)
        return answered

    return play


@attack("A3", right="connected|closed", cheap=True)
def bodies_that_do_not_come(stand: Stand) -> Play:
    """1,100 connections whose bodies do not come."""
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    return _held(stand, head, 1100)


@attack("A3b", right="connected|closed")
def headers_that_do_not_end(stand: Stand) -> Play:
    """1,000 connections whose headers do not end."""
    return _held(stand, b"POST /invocations HTTP/1.1\r\nHost: x\r\nX-A: ", 1000)


@attack("A3c", right="connected|closed")
def silence(stand: Stand) -> Play:
    """1,000 connections that say nothing."""
    return _held(stand, b"", 1000)


def _lists(size: int) -> bytes:
    return b"[" + b"[]," * (size // 3) + b"[]]"


@attack("A4", right=REFUSED, cheap=True)
def lists(stand: Stand) -> Play:
    """Ten bodies of 6 MB of empty lists."""
    body = _lists(6 * MB)
    return lambda: side_by_side([partial(invoke, stand, body)] * 10)


@attack("A4b", right=REFUSED)
def large_json(stand: Stand) -> Play:
    """JSON of 25 and 40 MB: empty lists, 1.5 million keys, numbers, nesting."""
    bodies = [
        _lists(25 * MB),
        b'{"messages": ' + _lists(40 * MB) + b"}",
        b"{" + b",".join(b'"%d":0' % number for number in range(1_500_000)) + b"}",
        b"[" + b"1e9," * (10 * MB) + b"0]",
        b"[" * MB + b"]" * MB,
        b'{"inputs": [' + b'{"name": 1},' * MB + b"{}]}",
        b'{"requestType": "NEW_SESSION", "text": "' + b"\\u0041" * (6 * MB) + b'"}',
    ]
    return lambda: side_by_side([partial(invoke, stand, body) for body in bodies])


@attack("A4c", right=REFUSED)
def large_data_uri(stand: Stand) -> Play:
    """A chat completion with a data URI of 40 MB, five times."""
    uri = f"data:image/png;base64,{base64.b64encode(bytes(30 * MB)).decode()}"
    content = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": uri}},
    ]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    return lambda: Counter(invoke(stand, body) for _ in range(5))


@attack("A5", right=r"4\d\d .*", cheap=True)
def binary_without_inputs(stand: Stand) -> Play:
    """Binary requests that lack their inputs, or whose JSON is none."""
    bodies = (
        b"{}",
        b'{"inputs": null}',
        b"[]",
        b"null",
        b'{"inputs": 3}',
        b'{"inputs": [3]}',
        b"x",
    )
    return lambda: Counter(
        invoke(stand, body, {"Content-Type": f"{BINARY}{size}"})
        for body in bodies
        for size in (len(body), len(body) + 5, -1)
    )


@attack("A6", right=REFUSED, cheap=True)
def long_headers(stand: Stand) -> Play:
    """Headers of 70 kB, at once and in pieces."""
    head = b"GET /ping HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n"

    def call(piece: int) -> str:
        with raw(stand.adapter_port) as connection:
            told = b""
            with suppress(OSError):
                for begin in range(0, len(head), piece):
                    connection.sendall(head[begin : begin + piece])
            with suppress(OSError):
                told = connection.recv(64)
            return told.split()[1].decode() if told else "closed"

    return lambda: side_by_side([partial(call, piece) for piece in (1000, 16_000, 200_000)])


@attack("A6b", right=r"4\d\d .*", cheap=True)
def compressed(stand: Stand) -> Play:
    """A gzip body: read as what it is, or refused as such; 20 MB of it are 20 kB."""
    body = gzip.compress(b"[" + b" " * 20 * MB + b"]")
    return lambda: Counter(invoke(stand, body, {"Content-Encoding": "gzip"}) for _ in range(3))
