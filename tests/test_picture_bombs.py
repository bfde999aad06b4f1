"""Small files whose decoding would take minutes are refused before it; ordinary ones are not."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import pytest
from PIL import Image

from llava_triton.errors import ErrorCode, SessionError
from llava_triton.images import decode_image
from llava_triton.settings import Settings

PICTURE = Image.linear_gradient("L").resize((200, 100)).convert("RGB")


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options)
    return buffer.getvalue()


def many_scans() -> bytes:
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 200 + data[-2:]


def many_exif_parts() -> bytes:
    data = saved("JPEG")
    return data[:2] + b"\xff\xe1\x00\x0aExif\0\0ab" * 1000 + data[2:]


def many_segments() -> bytes:
    data = saved("JPEG")
    return data[:2] + b"\xff\xe5\x00\x02" * 3000 + data[2:]


def many_profiles() -> bytes:
    data = saved("PNG")
    profile = b"iCCP" + b"a\0\0" + zlib.compress(bytes(1 << 16))
    chunk = struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile))
    return data[:33] + chunk * 5 + data[33:]


def many_chunks() -> bytes:
    data = saved("PNG")
    chunk = b"\0\0\0\0teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    return data[:33] + chunk * 60_000 + data[33:]


def run_lengths() -> bytes:
    buffer = io.BytesIO()
    PICTURE.convert("P").save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[30:34] = struct.pack("<I", 1)
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [many_scans, many_exif_parts, many_segments, many_profiles, many_chunks, run_lengths],
)
def test_bombs_are_refused_by_their_structure(
    make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make()  # type: ignore[operator]
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded
    with pytest.raises(SessionError, match="too long to decode") as told:
        decode_image(data, Settings())
    assert told.value.code is ErrorCode.INVALID_ARG


@pytest.mark.parametrize(
    "data",
    [
        saved("JPEG"),
        saved("JPEG", progressive=True, icc_profile=bytes(200_000), exif=b"Exif\0\0" + bytes(50)),
        saved("JPEG") + b"\xff\xda" * 5000,  # a film behind it, as telephones write it
        saved("PNG", icc_profile=bytes(1000)),
        saved("BMP"),
        saved("WEBP"),
        saved("GIF"),
    ],
    ids=["jpeg", "progressive, with profile and EXIF", "and a film", "png", "bmp", "webp", "gif"],
)
def test_ordinary_pictures_are_decoded(data: bytes) -> None:
    assert decode_image(data, Settings()).size == PICTURE.size


def test_a_file_that_is_cut_off_anywhere_is_decoded_or_refused_in_a_sentence() -> None:
    for data in (many_scans(), saved("PNG"), saved("BMP")):
        for length in range(0, min(len(data), 400)):
            with contextlib.suppress(SessionError):
                decode_image(data[:length], Settings())
