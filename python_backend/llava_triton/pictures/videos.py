"""The ways in which clients send a video: a file, or the frames themselves."""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import IMAGE, VIDEO, VIDEO_MARK
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import from_base64, shown
from llava_triton.pictures.formats import DECODED, VIDEOS, container_of, format_of

_HEADER_BYTES = 256
"""Of a data URI before its content, at the most."""
_HEADER = re.compile(rb"data:video/([\w.+*-]*)(;[^,]*)?", re.IGNORECASE)
_BASE64_ENDS = b";base64,"
_FRAMES = (b"jpeg", b"jpg", b"png", b"webp")
"""Types of a data URI whose content is the frames, each in base64, with commas between them."""
_JOINED = VIDEO_MARK + b"x-frames,"
"""Before the frames of a video that came as elements of their own, each behind its length."""
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Video:
    """A video as it was sent, taken apart."""

    file: bytes = b""
    """Encoded; empty where the frames came themselves."""
    frames: tuple[bytes, ...] = ()
    """Encoded pictures, in order, as the input `image` takes them. Of more than may be, one more is
    here."""
    num_frames: int | None = None
    """How many of a file's frames the client wants to be shown; None: it does not say."""


def turn_items(images: Sequence[bytes], videos: Sequence[bytes], settings: Settings) -> list[bytes]:
    """What a turn shows, as `PictureEncoding` takes it: pictures and videos, in order.

    Args:
        images: the elements of the input `image`.
        videos: those of `video`.
        settings: limits.

    Raises:
        SessionError: INVALID_ARG, there are too many, or `video` mixes pictures with videos.
    """
    items = [*images, *_marked(videos, settings)]
    if len(items) > settings.max_images_per_turn:
        raise invalid(
            f"image and video hold {len(items)} pictures and videos; a turn takes at most "
            f"{settings.max_images_per_turn}: send the others in later turns",
            IMAGE.name,
        )
    return items


def is_video(item: bytes) -> bool:
    """Whether an item of a turn is a video and no picture. (A GIF is one where it is marked.)"""
    return _is_marked(item) or container_of(item) in ("mov", "matroska")


def video_of(item: bytes, settings: Settings) -> Video:
    """Take a video apart; nothing of it is decoded but base64.

    Raises:
        SessionError: INVALID_ARG, about `video`; its sentence lacks a subject ("is empty ...").
    """
    if len(item) > 2 * settings.max_video_bytes:  # base64 with line breaks takes less
        raise _too_long(len(item), settings)
    if item.startswith(_JOINED):
        return Video(frames=tuple(islice(_split(item), settings.max_video_frames + 1)))
    if not _is_marked(item):
        return _file(item, None, settings)
    # A comma may be in it: codecs=vp8,opus.
    end = item.find(_BASE64_ENDS, 0, _HEADER_BYTES)
    inner = item.find(b",data:", 0, _HEADER_BYTES)
    is_base64 = end >= 0 and not 0 <= inner < end
    begin = end + len(_BASE64_ENDS) if is_base64 else item.find(b",", 0, _HEADER_BYTES) + 1
    header = _HEADER.match(item[: max(0, begin)])
    if not begin or header is None:
        raise invalid(
            f"is a data URI that begins with {shown(item)}; it must be data:video/...;base64,...",
            VIDEO.name,
        )
    wanted = _wanted(item[:begin], settings)
    if header[1].lower() in _FRAMES:
        frames = item[begin:].split(b",", settings.max_video_frames + 1)
        return Video(frames=tuple(frames[: settings.max_video_frames + 1]))
    if not is_base64:
        content = item[begin:]
        if _is_marked(content):  # in one that only says how many frames
            video = video_of(content, settings)
            return replace(video, num_frames=wanted or video.num_frames)
        if content[:5].lower() == b"data:":  # of another type, such as image/gif
            content = content[content.find(b",", 0, _HEADER_BYTES) + 1 :]
        # Of the input `video`, where base64 text needs no data URI.
        is_base64 = container_of(content) is None and _begins_as_base64(content) is not None
        return _file(_decoded(content) if is_base64 else content, wanted, settings)
    return _file(_decoded(item[begin:]), wanted, settings)


def with_num_frames(item: bytes, num_frames: int) -> bytes:
    """A video that says how many of its frames are shown."""
    return b"".join([VIDEO_MARK, b"*;num_frames=%d," % num_frames, item])


def _file(data: bytes, wanted: int | None, settings: Settings) -> Video:
    if not data:
        raise invalid(f"is empty; expected a video file ({VIDEOS})", VIDEO.name)
    if len(data) > settings.max_video_bytes:
        raise _too_long(len(data), settings)
    if container_of(data) is None:
        kind = format_of(data)
        found = f"a {kind} file" if kind else f"{len(data)} bytes that begin with"
        begins = "" if kind else f" {shown(data)}"
        raise invalid(
            f"is no video that is decoded here: {found}{begins}; send {VIDEOS}", VIDEO.name
        )
    return Video(file=data, num_frames=wanted)


def _wanted(header: bytes, settings: Settings) -> int | None:
    found = re.search(rb";num_frames=([^;,]*)", header)
    if found is None:
        return None
    text = found[1].decode("latin-1")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= number <= settings.max_video_frames:
        raise invalid(
            f"is to be shown as {text[:20]!r} frames; num_frames is a whole number from 1 to "
            f"{settings.max_video_frames}",
            VIDEO.name,
        )
    return number


def _marked(videos: Sequence[bytes], settings: Settings) -> list[bytes]:
    """The elements of the input `video` as items that say what they are."""
    are_frames = [_is_frame(each) for each in videos]
    if videos and all(are_frames):
        size = sum(map(len, videos))
        if size > 2 * settings.max_video_bytes:  # as of an item
            raise invalid(
                f"video holds {size} bytes of frames; the limit is {settings.max_video_bytes}: "
                "scale them down",
                VIDEO.name,
            )
        parts = [part for each in videos for part in (_LENGTH.pack(len(each)), each)]
        return [b"".join([_JOINED, *parts])]
    if any(are_frames):
        raise invalid(
            "video holds pictures and video files; send video files, or the frames of one video "
            "as picture files",
            VIDEO.name,
        )
    # A copy, only of what does not say by itself that it is a video.
    return [each if is_video(each) else b"".join([VIDEO_MARK, b"*,", each]) for each in videos]


def _is_frame(element: bytes) -> bool:
    """Whether an element of `video` is a picture, whatever form it is in."""
    if _is_marked(element):
        return False
    kind = format_of(element)
    if kind is None:
        begin = element.find(_BASE64_ENDS, 0, _HEADER_BYTES)
        begin = 0 if begin < 0 else begin + len(_BASE64_ENDS)
        first = _begins_as_base64(element[begin : begin + _HEADER_BYTES])
        kind = format_of(first) if first else None
    return kind in DECODED and kind != "GIF"


def _begins_as_base64(text: bytes) -> bytes | None:
    """The first bytes of what a text is in base64; None: it is none."""
    try:
        return from_base64(text[:64], 0)
    except binascii.Error:
        return None


def _decoded(text: bytes) -> bytes:
    try:
        return from_base64(text, 0)
    except binascii.Error as error:
        raise invalid(f"is no base64 text ({error}); send it whole", VIDEO.name) from None


def _split(item: bytes) -> Iterator[bytes]:
    place = len(_JOINED)
    while place < len(item):
        (length,) = _LENGTH.unpack_from(item, place) if place + 4 <= len(item) else (len(item),)
        place += _LENGTH.size
        yield item[place : place + length]
        place += length


def _is_marked(item: bytes) -> bool:
    return item[: len(VIDEO_MARK)].lower() == VIDEO_MARK


def _too_long(size: int, settings: Settings) -> SessionError:
    return invalid(
        f"is {size} bytes long; the limit is {settings.max_video_bytes}: cut it or scale it down",
        VIDEO.name,
    )
