"""Pictures as JSON requests name them: base64, data URIs, https and s3 URLs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from llava_sagemaker.adapter.errors import AdapterError, invalid_request


class Fetch(Protocol):
    """Gets a picture from somewhere else."""

    async def __call__(self, url: str) -> bytes:
        """The file at an https or s3 URL.

        Raises:
            AdapterError: image_not_allowed or image_not_fetched.
        """


class Pictures:
    """Makes what the models take of what requests name.

    Args:
        fetch: for URLs.
        limit: pictures in one request, at most; for what Triton takes in one turn.
    """

    def __init__(self, fetch: Fetch, limit: int) -> None:
        self._fetch = fetch
        self._limit = limit

    async def load(self, named: Sequence[Any]) -> list[bytes]:
        """Pictures for the input `image`, in order.

        Base64 and data URIs go as they came: Triton's side decodes them.

        Raises:
            AdapterError: image_..., one of them is no picture or may not be fetched.
        """
        if len(named) > self._limit:
            raise invalid_request(
                f"the request has {len(named)} pictures; it may have {self._limit}: send the "
                "others in later turns of a session"
            )
        return list(await asyncio.gather(*map(self._one, named)))

    async def _one(self, named: Any) -> bytes:
        if not isinstance(named, str) or not named:
            raise AdapterError(
                400, "image_invalid", "a picture must be base64 text, a data URI or a URL"
            )
        scheme, colon, _ = named[:16].partition(":")
        if not colon or scheme.lower() == "data":
            return named.encode(errors="replace")
        return await self._fetch(named)
