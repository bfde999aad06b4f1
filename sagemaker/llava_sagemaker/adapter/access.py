"""Who may ask, where nothing in front of the adapter says so."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_sagemaker.adapter.errors import AdapterError

OPEN_PATHS = ("/ping", "/health")
"""Load balancers know no key."""


class ApiKey:
    """ASGI middleware that lets only requests pass that know a key: `Authorization: Bearer KEY`.

    Args:
        app: what they pass to.
        key: the key.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "")
            kind, _, key = given.partition(" ")
            is_known = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
            if kind.lower() != "bearer" or not is_known:
                response = _unauthorized(bool(given)).response({"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _unauthorized(has_key: bool) -> AdapterError:
    given = "the request's API key is wrong" if has_key else "the request has no API key"
    return AdapterError(
        401,
        "invalid_api_key",
        f"{given}; send the server's own in the header Authorization: Bearer KEY",
    )
