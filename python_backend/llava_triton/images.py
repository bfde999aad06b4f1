"""Pictures as clients send them, to the pixel values that the vision encoder takes."""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_triton.errors import SessionError, invalid
from llava_triton.settings import Settings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded; Pillow knows more, but each decoder more is one more to attack."""

_DATA_URI = re.compile(rb"\s*data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]+\Z")


def decode_images(items: Sequence[bytes], settings: Settings) -> list[Image.Image]:
    """Decode the pictures of one turn.

    Raises:
        SessionError: INVALID_ARG, says which picture is bad and why.
    """
    images = []
    for index, item in enumerate(items):
        try:
            images.append(decode_image(encoded_image(item), settings))
        except SessionError as error:
            which = "image" if len(items) == 1 else f"image {index + 1} of {len(items)}"
            raise SessionError(error.code, f"{which} {error.sentence}") from error
    return images


def encoded_image(item: bytes) -> bytes:
    """The file's bytes of a picture sent raw, as base64 text or as a data URI.

    Raises:
        SessionError: INVALID_ARG, text that is not base64. The sentence lacks its subject.
    """
    uri = _DATA_URI.match(item)
    text = item[uri.end() :] if uri else item
    if not uri and not _BASE64.match(item):
        return item  # the first bytes of every accepted format are no base64
    try:
        # Both alphabets, and line breaks as mail programs and `base64` put them in.
        compact = re.sub(rb"\s", b"", text).translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise invalid(
            f"looks like base64 text but is not ({error}); send the file's bytes, or its base64"
        ) from error


def decode_image(data: bytes, settings: Settings) -> Image.Image:
    """Decode a picture, upright, to RGB: what `transformers.image_utils.load_image` gives.

    Args:
        data: an encoded file.
        settings: limits; the pixel limit is checked from the header, before decoding.

    Raises:
        SessionError: INVALID_ARG: too large, no picture, or a damaged one. The sentence lacks its
            subject.
    """
    if len(data) > settings.max_image_bytes:
        raise invalid(
            f"is {len(data)} bytes; the limit is {settings.max_image_bytes}: send a smaller file"
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of, and at twice its limit refuses, large pictures; ours is below both.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = image.width * image.height
            if pixels > settings.max_image_pixels:
                raise invalid(
                    f"has {image.width} x {image.height} = {pixels} pixels; the limit is "
                    f"{settings.max_image_pixels}: scale it down"
                )
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except SessionError:
        raise
    except UnidentifiedImageError as error:
        raise invalid(
            f"is no picture: {len(data)} bytes that begin with {data[:8]!r}; "
            f"send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        ) from error
    except Image.DecompressionBombError as error:
        raise invalid(f"has too many pixels: {error}") from error
    # What Pillow's decoders raise on damaged files is no closed set.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        MemoryError,
    ) as error:
        raise invalid(f"is damaged or cut off and cannot be decoded: {error}") from error


class PixelValues:
    """The checkpoint's own image processor.

    Args:
        directory: holds its `preprocessor_config.json` or `processor_config.json`.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoImageProcessor  # takes seconds; decoding alone needs none

        self._processor: Any = AutoImageProcessor.from_pretrained(directory)

    def pixel_values(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> pixel values [N, 3, H, W], float32."""
        batch = self._processor(list(images), return_tensors="np")
        return np.asarray(batch["pixel_values"], dtype=np.float32)
