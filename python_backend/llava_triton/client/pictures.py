"""The ways to hand over a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from llava_triton.contract.errors import invalid

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "bytes | str | PathLike[str] | Image"
"""An encoded picture file's bytes, its path, or a picture of Pillow."""


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
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | PathLike):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise invalid(f"the picture {str(picture)!r} cannot be read: {error}") from error
    from PIL import ImageOps  # whoever has a picture of Pillow has Pillow

    buffer = io.BytesIO()
    ImageOps.exif_transpose(picture).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
