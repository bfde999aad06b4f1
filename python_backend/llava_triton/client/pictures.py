"""The ways to hand over a picture or a video."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from llava_triton.contract.errors import invalid
from llava_triton.contract.models import VIDEO_MARK

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "bytes | str | PathLike[str] | Image"
"""An encoded picture file's bytes, its path, or a picture of Pillow."""


Video: TypeAlias = "bytes | str | PathLike[str] | Sequence[Picture]"
"""An encoded video file's bytes, its path, or the frames: pictures, in order."""


def shown(
    image: Picture | Iterable[Picture] | None, video: Video | None, num_frames: int | None
) -> list[bytes]:
    """What a turn shows, as elements of the input `image`: pictures, then the video.

    Raises:
        SessionError: INVALID_ARG, a file cannot be read.
    """
    return encoded_pictures(image) + encoded_video(video, num_frames)


def encoded_video(video: Video | None, num_frames: int | None = None) -> list[bytes]:
    """A video as an element of the input `image`; none: no element.

    Args:
        video: whose frames are shown.
        num_frames: how many of a file's, evenly over its length; None: the server's number.

    Raises:
        SessionError: INVALID_ARG, a file cannot be read, or there are no frames.
    """
    if video is None:
        return []
    if isinstance(video, bytes | str | PathLike):
        number = "" if num_frames is None else f";num_frames={num_frames}"
        return [b"".join([VIDEO_MARK, f"*{number},".encode(), _file(video, "video")])]
    frames = [base64.b64encode(_encoded(frame)) for frame in video]
    if not frames:
        raise invalid("the video has no frames; give a file or at least one picture")
    return [b"".join([VIDEO_MARK, b"jpeg;base64,", b",".join(frames)])]


def encoded_pictures(image: Picture | Iterable[Picture] | None) -> list[bytes]:
    """One, several or no pictures -> encoded files.

    Raises:
        SessionError: INVALID_ARG, a file cannot be read.
    """
    if image is None:
        return []
    if isinstance(image, bytes | str | PathLike) or not isinstance(image, Iterable):
        return [_encoded(image)]
    return [_encoded(picture) for picture in image]


def _encoded(picture: Picture) -> bytes:
    if isinstance(picture, bytes | str | PathLike):
        return _file(picture, "picture")
    from PIL import ImageOps  # whoever has a picture of Pillow has Pillow

    buffer = io.BytesIO()
    ImageOps.exif_transpose(picture).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _file(file: bytes | str | PathLike[str], kind: str) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise invalid(f"the {kind} {str(file)!r} cannot be read: {error}") from error
