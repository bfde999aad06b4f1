"""The runtime API of SageMaker, as far as it invokes endpoints."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

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
from llava_sagemaker.local.bearer_token import check_bearer
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
_FORWARDED_API = "X-Amzn-SageMaker-Forwarded-Api"
"""Tells the container which operation was called (AWS's own servers read it)."""
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

    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's path: the container's answer as it is, errors and events too."""
        try:
            check_bearer(request.headers.get("Authorization", ""))
            session = self._session(request)
            if session == NEW_SESSION:
                raise validation_error("open a stateful session by InvokeEndpoint")
            body = await self._body(request)
            told, held = await self._begin(request, session, body, "InvokeEndpoint")
        except ServiceError as error:
            return error.response()
        passed = ("Content-Type", "Retry-After", _CLOSED_SESSION)
        headers = {name: told.headers[name] for name in passed if name in told.headers}
        return _PassedOn(told, self._routing, held, told.content.iter_any(), headers)

    async def _whole(self, request: Request, instance: LocalInstance, body: bytes) -> Response:
        try:
            posted = self._post(request, instance, body, "InvokeEndpoint")
            async with asyncio.timeout(ANSWER_SECONDS), posted as told:
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
        told, held = await self._begin(request, session, body, "InvokeEndpointWithResponseStream")
        if told.status >= 400:
            async with told:
                held.close()
                raise model_error(told.status, (await told.read()).decode(errors="replace"))
        headers = {
            "Content-Type": "application/vnd.amazon.eventstream",
            "X-Amzn-SageMaker-Content-Type": told.headers.get("Content-Type", ""),
            "x-Amzn-Invoked-Production-Variant": VARIANT,
        }
        if _ATTRIBUTES in told.headers:
            headers[_ATTRIBUTES] = told.headers[_ATTRIBUTES]
        return _PassedOn(told, self._routing, held, _event_stream(told), headers)

    async def _begin(
        self, request: Request, session: str | None, body: bytes, operation: str
    ) -> tuple[aiohttp.ClientResponse, ExitStack]:
        """A container's answer whose body is still to come, and the hold on its instance, which is
        to be let go when the last byte has gone out.

        Raises:
            ServiceError: there is none.
        """
        with ExitStack() as held:
            instance = held.enter_context(self._routing.instance_for(session))
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    told = await self._post(request, instance, body, operation)
            except TimeoutError:
                message = f"the container was silent for {ANSWER_SECONDS:.0f} s"
                raise model_error(0, "", f"Invocation timed out: {message}") from None
            except aiohttp.ClientError as error:
                raise self._lost(instance, error) from None
            return told, held.pop_all()
        raise AssertionError

    def _post(
        self, request: Request, instance: LocalInstance, body: bytes, operation: str
    ) -> aiohttp.client._RequestContextManager:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        headers[_FORWARDED_API] = operation
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
    """A container's answer, passed on as it comes.

    Args:
        told: the container's answer.
        routing: hears of a session that it closes.
        held: the hold on the instance, let go at the end.
        body: what goes out.
        headers: of the answer.
    """

    def __init__(
        self,
        told: aiohttp.ClientResponse,
        routing: StickyRouting,
        held: ExitStack,
        body: AsyncIterator[bytes],
        headers: dict[str, str],
    ) -> None:
        super().__init__(self._pieces(body), told.status, headers)
        self._told = told
        self._routing = routing
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._told.close()
            self._held.close()

    async def _pieces(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in body:
            yield piece
        if _CLOSED_SESSION in self._told.headers:
            self._routing.closed(self._told.headers[_CLOSED_SESSION])


async def _event_stream(told: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """A container's answer in AWS's event stream; what the container wrote at once stays whole."""
    written: list[bytes] = []
    try:
        async for data, is_end in told.content.iter_chunks():
            written.append(data)
            if is_end and any(written):
                yield payload_part(b"".join(written))
                written.clear()
        if any(written):
            yield payload_part(b"".join(written))  # it was not chunked
    except aiohttp.ClientError as error:
        yield stream_error(f"the container broke its answer off: {error}")


def make_app(endpoint: str, instances: Sequence[LocalInstance]) -> Starlette:
    """The ASGI application of a runtime endpoint with one SageMaker endpoint."""
    runtime = Runtime(endpoint, instances)
    path = "/endpoints/{name}/invocations"
    openai = "/endpoints/{name}/openai/v1/chat/completions"
    routes = [
        Route(openai, runtime.chat_completions, methods=["POST"]),
        Route(path, runtime.invoke, methods=["POST"]),
        Route(f"{path}-response-stream", runtime.invoke_with_stream, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=runtime.lifespan)
