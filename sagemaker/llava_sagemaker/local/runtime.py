"""The runtime API of SageMaker, as far as it invokes endpoints."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager

import aiohttp
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_sagemaker.local.aws_wire import (
    ServiceError,
    model_error,
    payload_part,
    stream_error,
    validation_error,
)
from llava_sagemaker.local.instances import LocalInstance, watch
from llava_sagemaker.local.routing import StickyRouting

MAX_BODY_BYTES = 6 * 1024 * 1024
ANSWER_SECONDS = 60.0
"""For a whole answer, and for the first bytes of a streamed one."""
VARIANT = "AllTraffic"
_SESSION = "X-Amzn-SageMaker-Session-Id"
_NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"
_CLOSED_SESSION = "X-Amzn-SageMaker-Closed-Session-Id"
_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
_PASSED_ON = ("Content-Type", "Accept", _SESSION, _ATTRIBUTES, "X-Amzn-SageMaker-Inference-Id")
_SESSION_ID = re.compile(r"NEW_SESSION|[a-zA-Z0-9](-*[a-zA-Z0-9])*")
NEW_SESSION = "NEW_SESSION"


class Runtime:
    """Passes requests on to instances.

    Args:
        endpoint: its name.
        instances: all of them, started.
    """

    def __init__(self, endpoint: str, instances: Sequence[LocalInstance]) -> None:
        self._endpoint = endpoint
        self._instances = instances
        self._routing = StickyRouting(instances)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """While it serves, the instances are looked after."""
        connections = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connections,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),  # ours alone; aiohttp's would cut long streams
        ) as client:
            self._client = client
            watching = asyncio.create_task(watch(self._instances))
            yield
            watching.cancel()

    async def invoke(self, request: Request) -> Response:
        """InvokeEndpoint."""
        try:
            session = self._session(request)
            body = await self._body(request)
            with self._routing.instance_for(session) as instance:
                return await self._whole(request, instance, body)
        except ServiceError as error:
            return error.response()

    async def invoke_with_stream(self, request: Request) -> Response:
        """InvokeEndpointWithResponseStream."""
        try:
            session = self._session(request)
            if session == NEW_SESSION:
                raise validation_error(
                    "a stateful session cannot be opened by InvokeEndpointWithResponseStream; open "
                    "it by InvokeEndpoint"
                )
            body = await self._body(request)
            return await self._stream(request, session, body)
        except ServiceError as error:
            return error.response()

    async def _whole(self, request: Request, instance: LocalInstance, body: bytes) -> Response:
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._post(request, instance, body) as told:
                content = await told.read()
        except TimeoutError:
            raise model_error(
                0,
                "",
                f"Invocation timed out: the container did not answer in {ANSWER_SECONDS:.0f} s",
            ) from None
        except aiohttp.ClientError as error:
            raise self._lost(instance, error) from None
        if told.status >= 400:
            raise model_error(told.status, content.decode(errors="replace"))
        if _NEW_SESSION in told.headers:
            self._routing.opened(told.headers[_NEW_SESSION], instance)
        if _CLOSED_SESSION in told.headers:
            self._routing.closed(told.headers[_CLOSED_SESSION])
        passed = ("Content-Type", _NEW_SESSION, _CLOSED_SESSION, _ATTRIBUTES)
        headers = {name: told.headers[name] for name in passed if name in told.headers}
        return Response(content, 200, {**headers, "x-Amzn-Invoked-Production-Variant": VARIANT})

    async def _stream(self, request: Request, session: str | None, body: bytes) -> Response:
        # Held until the last byte has gone out.
        held = self._routing.instance_for(session)
        instance = held.__enter__()
        posted = self._post(request, instance, body)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                told = await posted.__aenter__()
                if told.status >= 400:
                    raise model_error(told.status, (await told.read()).decode(errors="replace"))
        except BaseException as error:
            held.__exit__(None, None, None)
            if isinstance(error, TimeoutError):
                message = f"the container was silent for {ANSWER_SECONDS:.0f} s"
                raise model_error(0, "", f"Invocation timed out: {message}") from None
            if isinstance(error, aiohttp.ClientError):
                raise self._lost(instance, error) from None
            raise

        return _PassedOn(told, self._routing, held)

    def _post(
        self, request: Request, instance: LocalInstance, body: bytes
    ) -> aiohttp.client._RequestContextManager:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        # The streaming API has a name of its own for it.
        if "X-Amzn-SageMaker-Accept" in request.headers:
            headers["Accept"] = request.headers["X-Amzn-SageMaker-Accept"]
        return self._client.post(f"{instance.url}/invocations", data=body, headers=headers)

    def _session(self, request: Request) -> str | None:
        name = request.path_params["name"]
        if name != self._endpoint:
            raise validation_error(f"Endpoint {name} of account 000000000000 not found.")
        session = request.headers.get(_SESSION)
        if session and (len(session) > 256 or not _SESSION_ID.fullmatch(session)):
            raise validation_error(
                f"Value {session[:80]!r} at 'sessionId' failed to satisfy constraint: Member must "
                "have length at most 256 and match [a-zA-Z0-9](-*[a-zA-Z0-9])*"
            )
        return session

    async def _body(self, request: Request) -> bytes:
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size <= MAX_BODY_BYTES:
                pieces.append(piece)
        if size > MAX_BODY_BYTES:
            raise validation_error(
                f"the body has {size} bytes; HTTP content length exceeded {MAX_BODY_BYTES} bytes."
            )
        return b"".join(pieces)

    def _lost(self, instance: LocalInstance, error: Exception) -> ServiceError:
        instance.failed()
        return model_error(
            500, "", f"the container of instance {instance.number} has failed: {error}"
        )


class _PassedOn(StreamingResponse):
    """A container's streamed answer, as an event stream.

    Args:
        told: the container's answer.
        routing: hears of a session that it closes.
        held: the hold on the instance, let go at the end.
    """

    def __init__(
        self,
        told: aiohttp.ClientResponse,
        routing: StickyRouting,
        held: AbstractContextManager[LocalInstance],
    ) -> None:
        headers = {
            "X-Amzn-SageMaker-Content-Type": told.headers.get("Content-Type", ""),
            "x-Amzn-Invoked-Production-Variant": VARIANT,
        }
        if _ATTRIBUTES in told.headers:
            headers[_ATTRIBUTES] = told.headers[_ATTRIBUTES]
        kind = "application/vnd.amazon.eventstream"
        super().__init__(self._events(), headers=headers, media_type=kind)
        self._told = told
        self._routing = routing
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._told.close()
            self._held.__exit__(None, None, None)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._told.content.iter_any():
                yield payload_part(data)
            if _CLOSED_SESSION in self._told.headers:
                self._routing.closed(self._told.headers[_CLOSED_SESSION])
        except aiohttp.ClientError as error:
            yield stream_error(f"the container broke its answer off: {error}")


def make_app(endpoint: str, instances: Sequence[LocalInstance]) -> Starlette:
    """The ASGI application of a runtime endpoint with one SageMaker endpoint."""
    runtime = Runtime(endpoint, instances)
    path = "/endpoints/{name}/invocations"
    routes = [
        Route(path, runtime.invoke, methods=["POST"]),
        Route(f"{path}-response-stream", runtime.invoke_with_stream, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=runtime.lifespan)
