"""An HTTP request on /invocations: its headers and its body, within limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from email.message import Message

from starlette.requests import Request as HttpRequest

from llava_sagemaker.adapter.errors import AdapterError, invalid_request, unavailable
from llava_sagemaker.adapter.gunzip import unpacker
from llava_sagemaker.adapter.invocation import Request
from llava_sagemaker.adapter.off_loop import off_loop
from llava_sagemaker.adapter.session_ids import (
    NEW_SESSION,
    SESSION_ID,
    SESSION_NAME,
    checked_session_id,
    checked_session_name,
)
from llava_sagemaker.adapter.tenants import custom_attributes, tenant_of
from llava_triton.contract.operations import RESUME

BODY_SECONDS = 30.0
"""For a whole body to come."""
SILENCE_SECONDS = 10.0
"""A body that has begun goes on within this time."""
MOST_CONTENT_TYPE = 1000
"""Characters: reading its parameters takes the square of them."""
FORWARDED_API = "X-Amzn-SageMaker-Forwarded-Api"
"""Names the operation that SageMaker's caller used (AWS's own servers read it)."""
STREAMING_CALL = "invokeendpointwithresponsestream"
LARGEST_BODIES = 16
"""All bodies that are read or answered at once may take as much as so many of the largest."""
SMALL_BYTES = 64 * 1024
"""A body of a question, even a long one."""
SMALL_BODIES = 1024
"""So many have room however many large ones there are."""


class BodyRoom:
    """What all bodies together, and the pictures that they name, may take in memory.

    Args:
        limit_bytes: of one body.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._for_small = SMALL_BYTES * SMALL_BODIES
        self._left = limit_bytes * LARGEST_BODIES + self._for_small

    @contextlib.contextmanager
    def share(self) -> Iterator[BodyShare]:
        """Room for one request while the context lasts."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._left += share.taken

    def take(self, size: int, is_small: bool) -> None:
        """Make so many bytes less of it. Raises AdapterError, unavailable, where they are not
        left."""
        if size > self._left - (0 if is_small else self._for_small):
            raise unavailable("too many large bodies are under way; try again later")
        self._left -= size

    def give_back(self, size: int) -> None:
        """Make so many bytes more of it."""
        self._left += size


class BodyShare:
    """One request's part of a BodyRoom.

    Args:
        room: whose part.
    """

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.taken = 0
        """Bytes of the body and of the pictures that it names."""

    def take(self, size: int) -> None:
        """So many bytes more have come.

        Raises:
            AdapterError: body_too_large, or unavailable where the others leave too little.
        """
        if self.taken + size > self._room.limit_bytes:
            raise _too_large(self._room.limit_bytes)
        self._room.take(size, self.taken + size <= SMALL_BYTES)
        self.taken += size

    @contextlib.contextmanager
    def parsed(self, size: int) -> Iterator[None]:
        """What was parsed of the body takes so many bytes while the context lasts; they do not
        count towards the body's own limit.

        Raises:
            AdapterError: unavailable.
        """
        self._room.take(size, self.taken <= SMALL_BYTES)
        try:
            yield
        finally:
            self._room.give_back(size)


async def read_request(http: HttpRequest, limit_bytes: int, share: BodyShare) -> Request:
    """Read it.

    Args:
        http: the request.
        limit_bytes: of its body.
        share: of the room for bodies.

    Raises:
        AdapterError: body_too_large, unavailable, or invalid_request.
        SessionError: INVALID_ARG, the tenant's name is none.
    """
    session = http.headers.get(SESSION_ID)
    resumed = next(custom_attributes(http.headers, RESUME), None)
    resumes = session == NEW_SESSION and resumed is not None
    if resumes:
        session = resumed
    if session is not None and session != NEW_SESSION:
        session = checked_session_id(session)
    tenant = tenant_of(http.headers)
    name = http.headers.get(SESSION_NAME)
    named = http.headers.get("content-type", "")
    if len(named) > MOST_CONTENT_TYPE:
        raise unknown_content_type(named)
    header = Message()
    header["Content-Type"] = named
    try:
        # (A value may be more than text, by RFC 2231; none that is looked at here.)
        parameters = {
            name.lower(): value
            for name, value in header.get_params([])[1:]
            if isinstance(value, str)
        }
    except ValueError:
        raise unknown_content_type(named) from None
    by_streaming_call = http.headers.get(FORWARDED_API, "").lower() == STREAMING_CALL
    return Request(
        session=session,
        content_type=named.partition(";")[0].strip().lower(),
        content_parameters=parameters,
        wants_events=by_streaming_call
        or "text/event-stream" in http.headers.get("accept", "").lower(),
        by_streaming_call=by_streaming_call,
        body=await _body(http, limit_bytes, share.take),
        take=share.take,
        tenant=tenant,
        session_name=None if name is None else checked_session_name(name),
        resumes=resumes,
    )


async def _body(http: HttpRequest, limit: int, take: Callable[[int], None]) -> bytes:
    length = http.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)
    gzip = unpacker(http.headers.get("content-encoding", ""))
    pieces: list[bytes] = []
    size = 0
    now = asyncio.get_running_loop().time
    end = now() + BODY_SECONDS
    try:
        async with asyncio.timeout(SILENCE_SECONDS) as silence:
            async for received in http.stream():
                silence.reschedule(None)  # it is our turn
                packed: bytes | None = received
                while packed is not None:
                    piece, packed = packed, None
                    if gzip is not None:
                        piece, packed = await off_loop(size, gzip.step, piece)
                    take(len(piece))
                    size += len(piece)
                    pieces.append(piece)
                silence.reschedule(min(end, now() + SILENCE_SECONDS))
    except TimeoutError:
        raise AdapterError(
            408,
            "invalid_request",
            f"the body has not come within {BODY_SECONDS:.0f} s, or stopped for "
            f"{SILENCE_SECONDS:.0f} s; send it again",
        ) from None
    if gzip is not None:
        gzip.end()
    return await off_loop(size, b"".join, pieces)


def _too_large(limit: int) -> AdapterError:
    return AdapterError(
        413,
        "body_too_large",
        f"the body, with the pictures that it names, is larger than {limit} bytes; send smaller "
        "ones, or fewer at once",
    )


def unknown_content_type(content_type: str) -> AdapterError:
    """The body is of no kind that is understood."""
    return AdapterError(
        415,
        "invalid_request",
        f"the content type is {content_type[:80]!r}; send application/json, image/* or "
        "application/vnd.sagemaker-triton.binary+json",
    )


def unknown_json() -> AdapterError:
    """The JSON is of no kind that is understood."""
    return invalid_request(
        "the JSON is none of what is understood here: a session request (requestType), a chat "
        "completion (messages), a text (prompt or inputs), an inference request (inputs), or one "
        "of the LLaVA sample (type)"
    )
