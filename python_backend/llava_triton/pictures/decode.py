"""From what clients send as a picture to its pixels."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import IMAGE
from llava_triton.contract.settings import Settings
from llava_triton.pictures.bombs import refuse_bombs
from llava_triton.pictures.colours import to_rgb
from llava_triton.pictures.formats import DECODED, PILLOW_FORMATS, SEND_INSTEAD, format_of

MAX_ASPECT_RATIO = 100
"""Processors scale the shorter side to a fixed length: a picture of 1 x 50,000,000 pixels passes
every other limit and would become 336 x 16,800,000,000."""

SPARE = 2
"""Pixels a side, over those that the image processor makes, that a picture keeps when it is decoded
at a smaller size: the processor's own filter still decides what is seen. Pixel values then differ
by 1 of 255 or so from those of the whole picture."""

_SLICE_BYTES = 1024 * 1024
"""Decoded at a time."""
_ACCEPTED = f"an encoded picture ({', '.join(DECODED)}), its base64 text or a data URI"
_URLS = (b"http://", b"https://", b"s3://")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]+\Z")
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")

# Ours is stricter, comes before decoding, too, and answers with a sentence; Pillow's would warn
# on the server's log first and stand in the way of an operator's larger limit.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")
"""Of what is odd in a client's file; whoever sends many would fill the log."""

LARGE_PIXELS = 16_000_000
"""Above that pictures are decoded one at a time: one of 50 million pixels takes a gigabyte and a
second or two."""
ORDINARY_SCANS = 10
"""Of a progressive JPEG. One of more counts as so much larger."""


def numbered(error: SessionError, number: int, count: int) -> SessionError:
    """The error of one of a turn's pictures, whose sentence lacks a subject, with its position.

    Args:
        error: its subject is `video` where the picture is one.
        number: of the picture in its turn, from 1 on.
        count: pictures of the turn.
    """
    kind = error.subject or IMAGE.name
    name = kind if count == 1 else f"{kind} {number} of {count}"
    return SessionError(error.code, f"{name} {error.sentence}", kind)


def encoded_image(item: bytes) -> bytes:
    """An element of the input `image` -> the bytes of an encoded picture file.

    A file is known by its first bytes; no base64 text of a file begins like one.

    Args:
        item: a picture file, its base64 text, or a `data:` URI in base64. The text may be
            URL-safe, lack its padding and have line breaks.

    Raises:
        SessionError: INVALID_ARG; its sentence lacks a subject ("is empty; ...").
    """
    if not item:
        raise invalid(f"is empty; expected {_ACCEPTED}")
    if format_of(item):
        return item
    if item[:8].lower().startswith(_URLS):
        raise invalid(
            f"is a URL ({shown(item)}), which the models do not fetch; send the picture itself, "
            "or ask through the session adapter, which fetches from the hosts it is allowed to"
        )
    begin = 0
    if item[:5].lower() == b"data:":
        begin = item.find(b",") + 1
        if not item[:begin].lower().endswith(b";base64,"):
            raise invalid(
                f"is a data URI that begins with {shown(item)}; it must be "
                "data:image/...;base64,..."
            )
    elif not _BASE64.match(item):
        raise invalid(_no_picture(item))
    try:
        return from_base64(item, begin)
    except binascii.Error as error:
        raise invalid(
            f"looks like base64 text but is not ({error}): it begins with {shown(item)}; expected "
            f"{_ACCEPTED}"
        ) from None


def from_base64(text: bytes, begin: int) -> bytes:
    """Decode in slices: all of a large picture at once would hold the interpreter's lock, and so
    every other turn, for a tenth of a second.

    Raises:
        binascii.Error: it is none.
    """
    decoded: list[bytes] = []
    rest = b""
    for start in range(begin, len(text), _SLICE_BYTES):
        rest += b"".join(text[start : start + _SLICE_BYTES].split()).translate(_FROM_URL_SAFE)
        if b"=" in rest:  # the end, or an error
            rest += b"".join(text[start + _SLICE_BYTES :].split()).translate(_FROM_URL_SAFE)
            break
        whole = max(0, len(rest) - 1) // 4 * 4  # padding may follow four characters, too
        decoded.append(base64.b64decode(rest[:whole], validate=True))
        rest = rest[whole:]
    decoded.append(base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True))
    return b"".join(decoded)


@dataclass(frozen=True)
class OpenPicture:
    """A picture file that has passed every check that needs no decoding."""

    data: bytes
    image: Image.Image
    """Pillow has read its header only."""
    scans: int
    """How often decoding goes over the pixels."""
    background: str
    """Of what is transparent, `#rrggbb`."""

    @property
    def is_large(self) -> bool:
        """Whether decoding takes so much memory or time that one at a time is enough."""
        pixels = self.image.width * self.image.height
        return pixels * max(1.0, self.scans / ORDINARY_SCANS) > LARGE_PIXELS

    def decode(self, side: int | None = None) -> Image.Image:
        """Decode as transformers' `load_image` does: upright (EXIF), then RGB; only once. But see
        `to_rgb`.

        The first frame of an animation.

        Args:
            side: pixels that the picture's shorter side will be scaled to. A large JPEG is then
                decoded at 1/2, 1/4 or 1/8 of its size, the smallest at which it has `SPARE` times
                as many: that is most of the time that a photograph takes. None: whole.

        Raises:
            SessionError: INVALID_ARG; its sentence lacks a subject ("is damaged ...").
        """
        with _faults(self.data), self.image as image:
            if side is not None:
                factor = SPARE * side / min(image.size)
                if factor <= 0.5:  # formats other than JPEG do nothing
                    width, height = (math.ceil(factor * each) for each in image.size)
                    image.draft(None, (width, height))
            return to_rgb(ImageOps.exif_transpose(image), self.background)


def open_picture(item: bytes, settings: Settings) -> OpenPicture:
    """Look at an element of the input `image`: its size by the file's header, and its structure.

    Args:
        item: as `encoded_image` takes it.
        settings: limits.

    Raises:
        SessionError: INVALID_ARG; its sentence lacks a subject ("has 60000 x 60000 pixels ...").
    """
    if len(item) > 2 * settings.max_image_bytes:  # base64 with line breaks takes less
        raise _too_long(item, settings)
    return _open_file(encoded_image(item), settings)


def _open_file(data: bytes, settings: Settings) -> OpenPicture:
    if len(data) > settings.max_image_bytes:
        raise _too_long(data, settings)
    kind = format_of(data)
    if kind is not None and kind not in DECODED:
        raise invalid(f"is a {kind} file, which is not decoded here; {SEND_INSTEAD}")
    scans = refuse_bombs(data, settings.max_image_pixels)
    with _faults(data):
        image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
        check_size(*image.size, settings.max_image_pixels)
    return OpenPicture(data, image, scans, settings.picture_background)


@contextmanager
def _faults(data: bytes) -> Iterator[None]:
    """What Pillow says of a file, as sentences."""
    try:
        yield
    except (SessionError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise invalid(_no_picture(data)) from None
    except Exception as error:  # a malformed file can raise nearly anything in Pillow's parsers
        raise invalid(
            f"is damaged or cut off ({str(error)[:100] or type(error).__name__}); send the whole "
            "file"
        ) from error


def check_size(width: int, height: int, most_pixels: int) -> None:
    """Refuse a picture that is too large or too thin.

    Raises:
        SessionError: INVALID_ARG; its sentence lacks a subject.
    """
    if width * height > most_pixels:
        raise invalid(
            f"has {width} x {height} = {width * height} pixels; the limit is "
            f"{most_pixels}: scale it down"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise invalid(
            f"has {width} x {height} pixels; one side may be at most {MAX_ASPECT_RATIO} times as "
            "long as the other"
        )


def _too_long(data: bytes, settings: Settings) -> SessionError:
    return invalid(
        f"is {len(data)} bytes long; the limit is {settings.max_image_bytes}: scale it down"
    )


def _no_picture(data: bytes) -> str:
    return f"is no picture: {len(data)} bytes that begin with {shown(data)}; expected {_ACCEPTED}"


def shown(data: bytes) -> str:
    """The first bytes of a file, for a sentence."""
    return repr(data[:16])[1:] + (" ..." if len(data) > 16 else "")
