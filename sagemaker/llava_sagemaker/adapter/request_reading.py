"""An HTTP request on /invocations: its headers and its body, within limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from email.message import Message

from starlette.requests import Request as HttpRequest

from llava_sagemaker.adapter.errors import AdapterError, invalid_request, unavailable
from llava_sagemaker.adapter.invocation import Request
from llava_sagemaker.adapter.session_ids import NEW_SESSION, SESSION_ID, checked_session_id
from llava_sagemaker.adapter.tenants import tenant_of

BODY_SECONDS = 30.0
"""For a whole body to come."""
MOST_CONTENT_TYPE = 1000
"""Characters: reading its parameters takes the square of them."""
LARGEST_BODIES = 16
"""All bodies that are read or answered at once may take as much as so many of the largest."""


class BodyRoom:
    """What all bodies together, and the pictures that they name, may take in memory.

    Args:
        limit_bytes: of one body.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._left = limit_bytes * LARGEST_BODIES

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Room for one body while the context lasts; what it gives takes so many bytes of it.

        Raises:
            AdapterError: body_too_large, or unavailable where the others leave too little.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if taken + size > self.limit_bytes:
                raise _too_large(self.limit_bytes)
            if size > self._left:
                raise unavailable("too many large bodies are under way; try again later")
            taken += size
            self._left -= size

        try:
            yield take
        finally:
            self._left += taken


async def read_request(http: HttpRequest, limit_bytes: int, take: Callable[[int], None]) -> Request:
    """Read it.

    Args:
        http: the request.
        limit_bytes: of its body.
        take: see `BodyRoom.share`.

    Raises:
        AdapterError: body_too_large, unavailable, or invalid_request.
        SessionError: INVALID_ARG, the tenant's name is none.
    """
    session = http.headers.get(SESSION_ID)
    if session is not None and session != NEW_SESSION:
        session = checked_session_id(session)
    tenant = tenant_of(http.headers)
    named = http.headers.get("content-type", "")
    if len(named) > MOST_CONTENT_TYPE:
        raise unknown_content_type(named)
    header = Message()
    header["Content-Type"] = named
    try:
        parameters = {name.lower(): value for name, value in header.get_params([])[1:]}
    except ValueError:
        raise unknown_content_type(named) from None
    return Request(
        session=session,
        content_type=named.partition(";")[0].strip().lower(),
        content_parameters=parameters,
        wants_events="text/event-stream" in http.headers.get("accept", "").lower(),
        body=await _body(http, limit_bytes, take),
        take=take,
        tenant=tenant,
    )


async def _body(http: HttpRequest, limit: int, take: Callable[[int], None]) -> bytes:
    length = http.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in http.stream():
                take(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise AdapterError(
            408,
            "invalid_request",
            f"the body has not come within {BODY_SECONDS:.0f} s; send it again",
        ) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


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
        "completion (messages), an inference request (inputs), or one of the LLaVA sample (type)"
    )
