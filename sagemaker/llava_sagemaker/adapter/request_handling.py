"""A request that asks the model for something, from its body to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llava_sagemaker.adapter.chat import chat_request, end_request
from llava_sagemaker.adapter.choices import choices, whole_choices
from llava_sagemaker.adapter.engines import Engines
from llava_sagemaker.adapter.errors import (
    as_adapter_error,
    invalid_request,
    unavailable,
)
from llava_sagemaker.adapter.event_stream import SILENCE_SECONDS, EventStream
from llava_sagemaker.adapter.image_fetch import ImageFetcher
from llava_sagemaker.adapter.invocation import Invocation, Request
from llava_sagemaker.adapter.json_body import JsonReader
from llava_sagemaker.adapter.metrics import AdapterMetrics
from llava_sagemaker.adapter.off_loop import off_loop
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.remembered import Remembered, SessionTurn
from llava_sagemaker.adapter.request_reading import (
    BodyRoom,
    BodyShare,
    read_request,
    unknown_content_type,
    unknown_json,
)
from llava_sagemaker.adapter.sample_requests import sample_request
from llava_sagemaker.adapter.session_ids import closed_header, opened_header
from llava_sagemaker.adapter.session_requests import (
    empty_session,
    raw_picture,
    resumed_session,
    session_request,
)
from llava_sagemaker.adapter.text_requests import text_request
from llava_sagemaker.adapter.triton_format import (
    BINARY_CONTENT_TYPE,
    json_size,
    triton_request,
)
from llava_sagemaker.adapter.turns import LENGTH_BYTES, TritonTurn, limited
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.models import TEXTS
from llava_triton.contract.settings import Settings

WHOLE_SECONDS = 55.0
"""A whole answer is cut so long after its request: SageMaker gives up after 60 s."""
GRACE_SECONDS = 3.0
"""What the engine may take longer than it was given."""
JSON_TYPES = ("", "application/json", "application/octet-stream", "binary/octet-stream")
"""Clients that name no content type send JSON."""
SPARE_REQUESTS = 64
"""More than there may be turns, for the engine to refuse. Above that the adapter does, once a body
has come; and only here, so that /ping is answered however many requests there are."""

_NOTHING = Delta("", "stop", 0, 0, 0, 0.0)
"""The answer to a turn that asks for nothing."""

Result = TypeVar("Result")
_Understand = Callable[[HttpRequest, Request, BodyShare], Awaitable[Invocation]]
"""Makes of a request what to ask Triton; raises AdapterError or SessionError."""


class RequestHandler:
    """Answers requests of every kind, and has what all of them share.

    Args:
        engines: answer the turns.
        metrics: counts the requests.
        settings: of the model repository.
        hosts, buckets: from where pictures may be fetched.
    """

    def __init__(
        self,
        engines: Engines,
        metrics: AdapterMetrics,
        settings: Settings,
        hosts: Sequence[str] = (),
        buckets: Sequence[str] = (),
    ) -> None:
        self._engines = engines
        self._metrics = metrics
        self._settings = settings
        most_bytes = max(settings.max_image_bytes, settings.max_video_bytes)
        fetch = ImageFetcher(list(hosts), list(buckets), most_bytes)
        self._pictures = Pictures(fetch, settings.max_images_per_turn)
        # More than there can be: one that has ended is not always told.
        self._remembered = Remembered(2 * settings.max_sessions * len(engines.all))
        self._json = JsonReader(settings.max_text_bytes)
        self._reading = 0
        """Requests whose body has not come: they take no place of those that could be answered."""
        # A picture in base64, and the texts.
        self._bodies = BodyRoom(most_bytes * 4 // 3 + 2 * settings.max_text_bytes)

    async def any_kind(self, http: HttpRequest) -> Response:
        """The answer to a request, whatever its kind."""
        return await self._answer(http, self._understand)

    async def chat(self, http: HttpRequest) -> Response:
        """The answer to a chat completion."""
        return await self._answer(http, self._understand_chat)

    async def end_session(self, http: HttpRequest) -> Response:
        """The answer to a request that ends the session of a client's own name."""
        return await self._answer(http, self._understand_end)

    async def _answer(self, http: HttpRequest, understand: _Understand) -> Response:
        with self._bodies.share() as share:  # until the answer, or its first piece
            return await self._invocation(http, share, understand)

    async def _invocation(
        self, http: HttpRequest, share: BodyShare, understand: _Understand
    ) -> Response:
        began = time.monotonic()
        kind, outcome = "unknown", "ok"
        session_turn = None
        self._metrics.in_flight += 1
        streams = False
        try:
            request = await self._read(http, share)
            invocation = await understand(http, request, share)
            turn = replace(invocation.turn, tenant=request.tenant)
            invocation, kind = replace(invocation, turn=turn), invocation.kind
            if request.resumes:
                invocation = replace(invocation, opened=request.session)
            if kind != "chat" and not invocation.only_resumes:
                begun = self._remembered.other_turn_begins(invocation.turn)
                invocation = replace(invocation, session_turn=begun)
            session_turn = invocation.session_turn
            if not invocation.stream:
                return await self._whole(http, invocation, began)
            if invocation.choices > 1:
                pieces = choices(self._engines, invocation.turn, invocation.choices)
            else:
                pieces = self._engines.pieces(invocation.turn)
            # The status is the first piece's to tell.
            async with asyncio.timeout(SILENCE_SECONDS):
                first = await _while_connected(http, anext(pieces))
            streams = True
            return EventStream(
                invocation.format,
                session_turn,
                first,
                pieces,
                self._headers(invocation),
                partial(self._ended, kind, session_turn),
            )
        except ClientDisconnect:
            outcome = "disconnected"
            return Response(status_code=499)
        except Exception as error:
            outcome, response = _refusal(error)
            return response
        finally:
            if not streams:
                self._ended(kind, session_turn, outcome)

    async def _read(self, http: HttpRequest, share: BodyShare) -> Request:
        self._reading += 1
        try:
            request = await read_request(http, self._bodies.limit_bytes, share)
        finally:
            self._reading -= 1
        most = self._settings.max_queued_turns * len(self._engines.all) + SPARE_REQUESTS
        if self._metrics.in_flight - self._reading > most:
            raise unavailable("too many requests are under way; try again later")
        return request

    async def _check_open(self, http: HttpRequest, tenant: str, session_id: str) -> None:
        """Raises SessionError, NOT_FOUND, where the tenant has no such session."""
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await _while_connected(
                    http, self._engines.whole(TritonTurn(session_id, tenant=tenant))
                )
        except SessionError as error:
            if error.code is not ErrorCode.INVALID_ARG:  # there is one, and it was asked nothing
                raise

    async def _understand(
        self, http: HttpRequest, request: Request, share: BodyShare
    ) -> Invocation:
        if request.content_type.startswith(("image/", "video/")):
            return raw_picture(request)
        binary = request.content_type == BINARY_CONTENT_TYPE
        if not binary and request.content_type not in JSON_TYPES:
            raise unknown_content_type(request.content_type)
        if not binary and not request.body:
            if request.opens:
                return empty_session(request)
            if request.resumes:
                return resumed_session(request)
        size = json_size(request) if binary else len(request.body)
        outline = await self._json.outline(request.body[:size])
        with share.parsed(outline.parsed_bytes):
            fields = await self._json.object(outline)
            if binary or isinstance(fields.get("inputs"), list):
                invocation = await off_loop(
                    len(request.body), triton_request, request, fields, size
                )
            elif "requestType" in fields:
                invocation = await session_request(request, fields, self._pictures)
            elif "messages" in fields:
                invocation = await self._chat(http, request, fields)
            elif "prompt" in fields or "inputs" in fields:
                invocation = await text_request(request, fields, self._pictures)
            elif "type" in fields:
                invocation = await sample_request(request, fields, self._pictures)
            else:
                raise unknown_json()
        self._check_texts(invocation.turn)
        return invocation

    async def _understand_chat(
        self, http: HttpRequest, request: Request, share: BodyShare
    ) -> Invocation:
        if request.content_type not in JSON_TYPES:
            raise unknown_content_type(request.content_type)
        outline = await self._json.outline(request.body)
        with share.parsed(outline.parsed_bytes):
            invocation = await self._chat(http, request, await self._json.object(outline))
        self._check_texts(invocation.turn)
        return invocation

    async def _understand_end(
        self, http: HttpRequest, request: Request, share: BodyShare
    ) -> Invocation:
        return end_request(request)

    async def _chat(
        self, http: HttpRequest, request: Request, fields: dict[str, Any]
    ) -> Invocation:
        check_open = partial(self._check_open, http, request.tenant)
        return await chat_request(request, fields, self._pictures, self._remembered, check_open)

    def _check_texts(self, turn: TritonTurn) -> None:
        """As the models would, but before all is copied to them."""
        most = self._settings.max_text_bytes
        for spec in TEXTS:
            tensor = turn.tensors.get(spec.name)
            if tensor is not None and tensor.size > most + LENGTH_BYTES:
                raise invalid_request(
                    f"{spec.name} is {tensor.size - LENGTH_BYTES} bytes long; the limit is {most}: "
                    "shorten it"
                )

    async def _whole(self, http: HttpRequest, invocation: Invocation, began: float) -> Response:
        if invocation.only_resumes:
            asked = invocation.turn
            await self._check_open(http, asked.tenant, asked.session_id)
            body = invocation.format.whole(_NOTHING)
            return Response(body.content, 200, self._headers(invocation), body.content_type)
        left = WHOLE_SECONDS - (time.monotonic() - began)
        async with asyncio.timeout(left + GRACE_SECONDS):
            size = invocation.turn.size
            turn = await off_loop(size, limited, invocation.turn, max(left, 1.0))
            if invocation.choices > 1:
                answering = whole_choices(self._engines, turn, invocation.choices)
                body = invocation.format.choices(await _while_connected(http, answering))
            else:
                answer = await _while_connected(http, self._engines.whole(turn))
                if invocation.session_turn is not None:
                    invocation.session_turn.completed(answer.text)
                body = invocation.format.whole(answer)
        return Response(body.content, 200, self._headers(invocation), body.content_type)

    def _ended(self, kind: str, session_turn: SessionTurn | None, outcome: str) -> None:
        if session_turn is not None:
            session_turn.ended(outcome)
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


def _refusal(error: Exception) -> tuple[str, Response]:
    """Its code, and the answer. (No name of a frame that an error has passed may hold it: the two
    would stay, with the request's body, until the garbage collector came.)"""
    told = as_adapter_error(error)
    return told.code, told.response()


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
        del answering  # what failed holds this frame, which would hold it


async def _disconnection(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
