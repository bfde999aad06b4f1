"""The parsers. Each takes bytes and refuses them as it should, or raises."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llava_sagemaker.adapter.app import EXCEPTION_HANDLERS
from llava_sagemaker.adapter.engines import Engine
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.gunzip import unpacker
from llava_sagemaker.adapter.health import Health
from llava_sagemaker.adapter.metrics import AdapterMetrics
from llava_sagemaker.adapter.openai_paths import openai_routes
from llava_sagemaker.adapter.request_handling import RequestHandler
from llava_sagemaker.adapter.sagemaker_paths import sagemaker_routes
from llava_sagemaker.adapter.session_ids import (
    checked_session_id,
    checked_session_name,
    named_session_id,
)
from llava_sagemaker.adapter.tenants import tenant_of
from llava_sagemaker.adapter.turns import LENGTH_BYTES, TritonTurn
from starlette.applications import Starlette
from starlette.datastructures import Headers

from llava_triton.contract import protocol
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError, error_from_text, not_found
from llava_triton.contract.history import history_from_json, history_to_json
from llava_triton.contract.operations import Operation
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import open_picture
from tests.fuzz import seeds

SETTINGS = Settings(max_image_pixels=10_000, max_image_bytes=1 << 20)
MOST_SENTENCE = 2000
"""Characters of an error: a person reads it."""


@dataclass(frozen=True)
class Target:
    """A parser, or several that take the same."""

    run: Callable[[bytes], object]
    """Raises only where something is wrong. What it returns, `check` compares."""
    seeds: Sequence[bytes]
    """What clients really send. The first one is taken."""
    share: float
    """Of all inputs."""


def refusal(error: SessionError | AdapterError) -> str:
    """The sentence of an error that a client may get for bad input."""
    if isinstance(error, SessionError):
        assert error.code is not ErrorCode.INTERNAL, error
    else:
        assert error.status < 500, error
    assert 0 < len(error.sentence) < MOST_SENTENCE, error.sentence
    error.sentence.encode()  # no halves of characters
    return error.sentence


def parsed(parse: Callable[[], object]) -> object:
    """What a parser gives, or the sentence by which it refuses."""
    try:
        return parse()
    except (SessionError, AdapterError) as error:
        return refusal(error)


# The adapter: whole HTTP requests, to the turn that the models would get.


class Models:
    """In the place of all engines: reads a turn as the models do, and answers it."""

    def __init__(self) -> None:
        itself: Any = self
        self.all = [Engine(0, itself)]

    async def pieces(self, turn: TritonTurn) -> AsyncGenerator[Delta, None]:
        """Two of them."""
        turn.written("an-id", direct=False)
        read_turn(turn)
        if not turn.start and sum(turn.session_id.encode()) % 3 == 0:
            raise not_found("the session is unknown or has expired; open a new one")
        yield Delta("a", "", 1, 1, 0, 1.0, logprobs=LOGPROBS)
        yield Delta("nswer", "stop", 1, 2, 0, 1.0, logprobs=LOGPROBS)

    async def whole(self, turn: TritonTurn) -> Delta:
        """As one."""
        *_, last = [piece async for piece in self.pieces(turn)]
        return last


LOGPROBS = (json.dumps({"token": "a", "logprob": 0.0, "bytes": [97], "top_logprobs": []}),)


def read_turn(turn: TritonTurn) -> None:
    """As `image_encoder` and `language_model` read it."""
    arrays = {name: strings(b"".join(tensor.pieces)) for name, tensor in turn.tensors.items()}
    for name, tensor in turn.tensors.items():
        assert len(arrays[name]) == tensor.elements
    protocol.parse_turn(arrays.get("text_input"), arrays.get("sampling_parameters"), SETTINGS)
    protocol.parse_history(arrays.get("history"), SETTINGS)
    protocol.parse_positions(arrays.get("image_positions"), SETTINGS)
    protocol.image_items(arrays.get("image"), SETTINGS)
    protocol.parse_tenant({protocol.TENANT: turn.tenant} if turn.tenant else {})
    Operation.from_parameters(turn.parameters)


def strings(data: bytes) -> np.ndarray:
    """The elements of a BYTES tensor."""
    elements = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        assert len(data) >= LENGTH_BYTES + size
        elements.append(data[LENGTH_BYTES : LENGTH_BYTES + size])
        data = data[LENGTH_BYTES + size :]
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    return array


class Requests:
    """The adapter's application, asked without a network."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        models: Any = Models()
        counts, health = AdapterMetrics(models), Health(models)
        handler = RequestHandler(models, counts, SETTINGS)
        routes = sagemaker_routes(handler, health, counts, ["127.0.0.1:1"])
        routes = [route for route in routes if route.path != "/metrics"]  # it would ask Triton
        self._app = Starlette(
            routes=[*routes, *openai_routes(handler, health)],
            exception_handlers=EXCEPTION_HANDLERS,
        )

    def run(self, data: bytes) -> object:
        """One request: `METHOD PATH` and headers, a line each, an empty line, the body."""
        head, _, body = data.partition(b"\n\n")
        first, *lines = head.split(b"\n")
        method, _, path = first.partition(b" ")
        headers = [tuple(line.partition(b": ")[::2]) for line in lines if b": " in line]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method.decode("latin-1"),
            "path": path.decode("latin-1"),
            "query_string": b"",
            "headers": [(name.lower(), value) for name, value in headers],
            "client": ("127.0.0.1", 1),
        }
        status, content = self._loop.run_until_complete(self._ask(scope, body))
        assert status < 500, (status, content)
        if status >= 400:
            error = json.loads(content)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert 0 < len(error["message"]) < MOST_SENTENCE
        return status, len(content)

    async def _ask(self, scope: dict[str, Any], body: bytes) -> tuple[int, bytes]:
        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        told: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            told.append(message)

        await self._app(scope, incoming.get, send)
        return told[0]["status"], b"".join(each.get("body", b"") for each in told[1:])


# The contract's parsers, by themselves.


def sampling(data: bytes) -> object:
    """`sampling_parameters`."""
    array = np.array([data], dtype=object)
    return parsed(lambda: protocol.parse_turn(None, array, SETTINGS)[1])


def texts(data: bytes) -> object:
    """`text_input`, `history`, `image_positions`, request parameters, errors' texts."""
    kind, data = data[:1], data[1:]
    array = np.array([data], dtype=object)
    if kind == b"h":
        told = parsed(lambda: protocol.parse_history(array, SETTINGS))
        if isinstance(told, tuple):
            assert history_from_json(history_to_json(list(told))) == told
        return told
    if kind == b"p":
        return parsed(lambda: protocol.parse_positions(array, SETTINGS))
    if kind == b"e":
        return str(error_from_text(data.decode(errors="replace")))
    if kind == b"o":
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(given, dict):
            return None
        return parsed(lambda: Operation.from_parameters(given))
    return parsed(lambda: protocol.parse_turn(array, None, SETTINGS)[0])


def headers(data: bytes) -> object:
    """Session IDs and names, tenants, packed bodies."""
    kind, data = data[:1], data[1:]
    text = data.decode("latin-1")
    if kind == b"i":
        return parsed(lambda: checked_session_id(text))
    if kind == b"n":
        return parsed(lambda: named_session_id("", checked_session_name(text)))
    if kind == b"g":
        return parsed(lambda: unpacked(data))
    raw = [tuple(line.partition(b": ")[::2]) for line in data.split(b"\n")]
    given = Headers(raw=[(name.lower(), value) for name, value in raw])
    return parsed(lambda: tenant_of(given))


def unpacked(data: bytes) -> int:
    """Bytes of a body that was packed by gzip."""
    gzip = unpacker("gzip")
    assert gzip is not None
    size = 0
    packed: bytes | None = data
    while packed is not None:
        piece, packed = gzip.step(packed)
        size += len(piece)
        if size > SETTINGS.max_image_bytes:
            raise AdapterError(413, "body_too_large", "it is too large")
    gzip.end()
    return size


def pictures(data: bytes) -> object:
    """Picture files, base64, data URIs: looked at, decoded, turned upright."""
    return parsed(lambda: open_picture(data, SETTINGS).decode(32).size)


def targets() -> dict[str, Target]:
    """All of them, by name."""
    return {
        "requests": Target(Requests().run, seeds.REQUESTS, 0.1),
        "sampling": Target(sampling, seeds.SAMPLING, 0.3),
        "texts": Target(texts, seeds.TEXTS, 0.25),
        "headers": Target(headers, seeds.HEADERS, 0.2),
        "pictures": Target(pictures, seeds.pictures(), 0.15),
    }
