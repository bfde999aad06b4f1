"""Where a server is, and the turns that open a session and ask in it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from llava_triton.client.pictures import Picture, Video, encoded_pictures, shown
from llava_triton.client.transport import TurnMessage, resuming
from llava_triton.contract.errors import invalid
from llava_triton.contract.history import PastTurn
from llava_triton.contract.sampling_parameters import Truncation

SCHEMES = ("grpc", "http", "sagemaker")


def split_url(url: str) -> SplitResult:
    """The parts of a URL.

    Raises:
        SessionError: INVALID_ARG, it has none, as where a bracket is not closed.
    """
    try:
        return urlsplit(url)
    except ValueError as error:
        raise invalid(f"the URL is {url!r}, which cannot be read: {error}") from error


@dataclass(frozen=True)
class Address:
    """A URL, read."""

    scheme: str
    """One of SCHEMES."""
    place: str
    """`host:port`, or an endpoint's name."""
    options: Mapping[str, str]
    """What follows the question mark of a sagemaker:// URL: `region`, `endpoint_url`."""

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            SessionError: INVALID_ARG, it is none that names a server.
        """
        parts = split_url(url)
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise invalid(
                f"the URL is {url!r}; give grpc://host:port or http://host:port or "
                "sagemaker://endpoint-name"
            )
        options = {}
        if parts.scheme == "sagemaker":
            options = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(options.keys() - {"region", "endpoint_url"})
        if unknown:
            raise invalid(
                f"the URL {url!r} says {', '.join(unknown)}; it may say region and endpoint_url"
            )
        return cls(parts.scheme, parts.netloc, options)


def opening_turn(
    address: Address,
    image: Picture | Iterable[Picture] | None,
    session_id: int | str | None,
    history: Sequence[PastTurn],
    truncation: Truncation | None = None,
    resume: int | str | None = None,
) -> TurnMessage:
    """The turn that opens a session; see `Session.open`.

    Raises:
        SessionError: INVALID_ARG, a picture cannot be read, the server chooses the ID, or what a
            session to resume would begin with is given.
    """
    if resume is not None:
        if session_id is not None or history or truncation is not None:
            raise invalid(
                "resume brings a session back as it was; leave session_id, history and truncation "
                "out"
            )
        return resuming(resume, encoded_pictures(image))
    if session_id is not None and address.scheme == "sagemaker":
        raise invalid("SageMaker's server chooses session IDs; leave session_id out")
    return TurnMessage(
        uuid.uuid4().hex if session_id is None else session_id,
        start=True,
        images=encoded_pictures(image),
        history=history,
        sampling={} if truncation is None else {"truncation": truncation},
    )


def asking(
    session_id: int | str,
    text: str,
    image: Picture | Iterable[Picture] | None,
    video: Video | None,
    num_frames: int | None,
    image_positions: Sequence[int] | None,
    sampling: dict[str, Any],
) -> TurnMessage:
    """A turn that asks; arguments as of `Session.ask`."""
    return TurnMessage(
        session_id,
        text=text,
        images=shown(image, video, num_frames),
        positions=None if image_positions is None else tuple(image_positions),
        sampling=sampling,
    )
