"""Pictures and videos as JSON requests name them: base64, data URIs, https and s3 URLs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_sagemaker.adapter.json_body import LongString
from llava_triton.contract.models import VIDEO_MARK


@dataclass(frozen=True)
class Video:
    """A video that a request names."""

    named: str | LongString
    """Base64, a data URI or a URL."""
    num_frames: int | None = None
    """Of it, that are to be shown; None: as many as the models show."""

    @property
    def mark(self) -> bytes:
        """What tells the models that what follows is a video."""
        number = "" if self.num_frames is None else f";num_frames={self.num_frames}"
        return VIDEO_MARK + f"*{number},".encode()


def named_pictures(fields: dict[str, Any]) -> list[Any]:
    """Take a request's `image`, one or a list, and its `video`; for `Pictures.load`."""
    image, video = fields.pop("image", []), fields.pop("video", [])
    images = image if isinstance(image, list) else [image]
    return [*images, *map(Video, video if isinstance(video, list) else [video])]


class Fetch(Protocol):
    """Gets a picture from somewhere else."""

    async def __call__(self, url: str) -> bytes:
        """The file at an https or s3 URL.

        Raises:
            AdapterError: image_not_allowed or image_not_fetched.
        """


FETCHED_AT_ONCE = 8
"""Pictures of a request. Room is taken for each when it is there: so many may lie outside of it."""


class Pictures:
    """Makes what the models take of what requests name.

    Args:
        fetch: for URLs.
        limit: pictures in one request, at most; for what Triton takes in one turn.
    """

    def __init__(self, fetch: Fetch, limit: int) -> None:
        self._fetch = fetch
        self._limit = limit

    async def load(
        self, named: Sequence[Any], take: Callable[[int], None]
    ) -> list[bytes | LongString]:
        """Pictures for the input `image`, in order.

        Base64 and data URIs go as they came: Triton's side decodes them.

        Args:
            named: by the request.
            take: takes room for those that are fetched.

        Raises:
            AdapterError: image_..., one of them is no picture or may not be fetched; or there is
                no room for it.
        """
        if len(named) > self._limit:
            raise invalid_request(
                f"the request has {len(named)} pictures; it may have {self._limit}: send the "
                "others in later turns of a session"
            )
        places = asyncio.Semaphore(FETCHED_AT_ONCE)
        coming = [asyncio.ensure_future(self._one(each, take, places)) for each in named]
        try:
            return list(await asyncio.gather(*coming))
        finally:
            # Those behind one that failed. What failed holds this frame, which must not hold it.
            while coming:
                coming.pop().cancel()

    async def _one(
        self, named: Any, take: Callable[[int], None], places: asyncio.Semaphore
    ) -> bytes | LongString:
        if isinstance(named, Video):
            return _joined(named.mark, await self._one(named.named, take, places))
        if isinstance(named, LongString):  # no URL is so long
            return named
        if not isinstance(named, str) or not named:
            raise AdapterError(
                400, "image_invalid", "a picture or video must be base64 text, a data URI or a URL"
            )
        scheme, colon, _ = named[:16].partition(":")
        if not colon or scheme.lower() == "data":
            return named.encode(errors="replace")
        async with places:
            fetched = await self._fetch(named)
            take(len(fetched))
        return fetched


def _joined(mark: bytes, content: bytes | LongString) -> LongString:
    """Without a copy of the content."""
    pieces = content.pieces if isinstance(content, LongString) else (content,)
    return LongString((mark, *pieces))
