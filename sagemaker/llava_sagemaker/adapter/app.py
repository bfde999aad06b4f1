"""The adapter's HTTP routes: /ping, /metrics and /invocations."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llava_sagemaker.adapter.chat import chat_request
from llava_sagemaker.adapter.errors import AdapterError, as_adapter_error, unavailable
from llava_sagemaker.adapter.event_stream import SILENCE_SECONDS, EventStream
from llava_sagemaker.adapter.health import Health
from llava_sagemaker.adapter.image_fetch import ImageFetcher
from llava_sagemaker.adapter.invocation import Invocation, Request, json_object
from llava_sagemaker.adapter.metrics import AdapterMetrics
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.remembered import Remembered
from llava_sagemaker.adapter.request_reading import (
    BodyRoom,
    read_request,
    unknown_content_type,
    unknown_json,
)
from llava_sagemaker.adapter.sample_requests import sample_request
from llava_sagemaker.adapter.session_ids import closed_header, opened_header
from llava_sagemaker.adapter.session_requests import empty_session, raw_picture, session_request
from llava_sagemaker.adapter.triton_format import (
    BINARY_CONTENT_TYPE,
    binary_request,
    triton_request,
)
from llava_sagemaker.adapter.turns import Triton, Turn, limited
from llava_triton.errors import ErrorCode, SessionError
from llava_triton.settings import Settings

WHOLE_SECONDS = 55.0
"""A whole answer is cut so long after its request: SageMaker gives up after 60 s."""
GRACE_SECONDS = 3.0
"""What the engine may take longer than it was given."""
JSON_TYPES = ("", "application/json", "application/octet-stream", "binary/octet-stream")
"""Clients that name no content type send JSON."""
METRICS_SECONDS = 5.0
SPARE_REQUESTS = 64
"""More than there may be turns, for the engine to refuse. Above that the adapter does, before it
reads a body; and only here, so that /ping is answered however many requests there are."""

Result = TypeVar("Result")

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy that the environment names: what it reads is on this machine."""


class Adapter:
    """What all requests share.

    Args:
        triton: `host:port` of Triton's gRPC endpoint.
        metrics: `host:port` of Triton's metrics.
        settings: of the model repository.
        hosts, buckets: from where pictures may be fetched.
    """

    def __init__(
        self, triton: str, metrics: str, settings: Settings, hosts: list[str], buckets: list[str]
    ) -> None:
        self._triton = Triton(triton)
        self._settings = settings
        self._health = Health(self._triton)
        self._metrics = AdapterMetrics()
        self._triton_metrics = f"http://{metrics}/metrics"
        fetch = ImageFetcher(hosts, buckets, settings.max_image_bytes)
        self._pictures = Pictures(fetch, settings.max_images_per_turn)
        self._remembered = Remembered(settings.max_sessions)
        # A picture in base64, and the texts.
        self._bodies = BodyRoom(settings.max_image_bytes * 4 // 3 + 2 * settings.max_text_bytes)

    async def ping(self, http: HttpRequest) -> Response:
        """200 where the engine answers, else 503."""
        try:
            await self._health.check()
        except AdapterError as error:
            return error.response()
        return Response(status_code=200)

    async def metrics(self, http: HttpRequest) -> Response:
        """Triton's metrics and our own."""
        try:
            told = await asyncio.to_thread(_read, self._triton_metrics)
        except OSError:
            told = ""  # it is starting, or has failed; /ping tells
        return PlainTextResponse(told + self._metrics.text())

    async def invocations(self, http: HttpRequest) -> Response:
        """One request, whatever its kind."""
        with self._bodies.share() as take:  # until the answer, or its first piece
            return await self._invocation(http, take)

    async def _invocation(self, http: HttpRequest, take: Callable[[int], None]) -> Response:
        began = time.monotonic()
        kind, outcome = "unknown", "ok"
        self._metrics.in_flight += 1
        streams = False
        try:
            if self._metrics.in_flight > self._settings.max_queued_turns + SPARE_REQUESTS:
                raise unavailable("too many requests are under way; try again later")
            request = await read_request(http, self._bodies.limit_bytes, take)
            invocation = await self._understand(request)
            turn = replace(invocation.turn, tenant=request.tenant)
            invocation, kind = replace(invocation, turn=turn), invocation.kind
            if kind != "chat":
                other = self._remembered.other_turn_begins(invocation.turn)
                invocation = replace(invocation, completed=lambda _: other())
            if invocation.reopens:
                async with asyncio.timeout(SILENCE_SECONDS):
                    await _while_connected(http, self._check_open(invocation.turn))
            if not invocation.stream:
                return await self._whole(http, invocation, began)
            pieces = self._triton.pieces(invocation.turn)
            # The status is the first piece's to tell.
            async with asyncio.timeout(SILENCE_SECONDS):
                first = await _while_connected(http, anext(pieces))
            streams = True
            return EventStream(
                invocation.format,
                invocation.completed,
                first,
                pieces,
                self._headers(invocation),
                partial(self._ended, kind),
            )
        except ClientDisconnect:
            outcome = "disconnected"
            return Response(status_code=499)
        except Exception as error:
            told = as_adapter_error(error)
            outcome = told.code
            return told.response()
        finally:
            if not streams:
                self._ended(kind, outcome)

    async def close(self) -> None:
        """Let the connection to Triton go."""
        await self._triton.close()

    async def _check_open(self, turn: Turn) -> None:
        """Raises SessionError, NOT_FOUND, where there is no session such as the turn's."""
        try:
            await self._triton.whole(Turn(turn.session_id, tenant=turn.tenant))
        except SessionError as error:
            if error.code is not ErrorCode.INVALID_ARG:  # there is one, and it was asked nothing
                raise

    async def _understand(self, request: Request) -> Invocation:
        if request.content_type.startswith("image/"):
            return raw_picture(request)
        if request.content_type == BINARY_CONTENT_TYPE:
            return binary_request(request)
        if request.content_type not in JSON_TYPES:
            raise unknown_content_type(request.content_type)
        if request.opens and not request.body:
            return empty_session(request)
        fields = json_object(request.body)
        if "requestType" in fields:
            return await session_request(request, fields, self._pictures)
        if "messages" in fields:
            return await chat_request(request, fields, self._pictures, self._remembered)
        if "inputs" in fields:
            return triton_request(request, fields)
        if "type" in fields:
            return await sample_request(request, fields, self._pictures)
        raise unknown_json()

    async def _whole(self, http: HttpRequest, invocation: Invocation, began: float) -> Response:
        left = WHOLE_SECONDS - (time.monotonic() - began)
        async with asyncio.timeout(left + GRACE_SECONDS):
            asked = self._triton.whole(limited(invocation.turn, max(left, 1.0)))
            answer = await _while_connected(http, asked)
        invocation.completed(answer.text)
        body = invocation.format.whole(answer)
        return Response(body.content, 200, self._headers(invocation), body.content_type)

    def _ended(self, kind: str, outcome: str) -> None:
        self._metrics.in_flight -= 1
        self._metrics.ended(kind, outcome)

    def _headers(self, invocation: Invocation) -> dict[str, str]:
        headers = []
        if invocation.opened is not None:
            lifetime = self._settings.session_lifetime_seconds
            headers.append(opened_header(invocation.opened, lifetime))
        if invocation.closed is not None:
            headers.append(closed_header(invocation.closed))
        return dict(headers)


async def _while_connected(http: HttpRequest, answer: Awaitable[Result]) -> Result:
    """What an awaitable gives, given up when the client goes away.

    Raises:
        ClientDisconnect: it has gone.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnection(http))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        leaving.cancel()
        if not answering.done():
            answering.cancel()
            await asyncio.wait((answering,))


async def _disconnection(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _read(url: str) -> str:
    with _DIRECT.open(url, timeout=METRICS_SECONDS) as response:
        text: str = response.read().decode()
        return text


def make_app(
    triton: str, metrics: str, settings: Settings, hosts: list[str], buckets: list[str]
) -> Starlette:
    """The ASGI application; arguments as for `Adapter`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Here, where the event loop runs: gRPC's channel belongs to it.
        adapter = Adapter(triton, metrics, settings, hosts, buckets)
        app.router.routes += [
            Route("/ping", adapter.ping, methods=["GET"]),
            Route("/metrics", adapter.metrics, methods=["GET"]),
            Route("/invocations", adapter.invocations, methods=["POST"]),
        ]
        yield
        await adapter.close()

    return Starlette(lifespan=lifespan)
