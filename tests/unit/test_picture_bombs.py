"""Small files whose decoding would take minutes are refused before it; ordinary ones are not."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import open_picture


def decode_image(item: bytes, settings: Settings, side: int | None = None) -> Image.Image:
    return open_picture(item, settings).decode(side)


PICTURE = Image.linear_gradient("L").resize((200, 100)).convert("RGB")


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options)
    return buffer.getvalue()


def many_scans() -> bytes:
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 200 + data[-2:]


def scans_of_a_size(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG whose header promises so many pixels; those of `PICTURE` are there."""
    data = saved("JPEG", progressive=True)
    frame, last = data.index(b"\xff\xc2"), data.rindex(b"\xff\xda")
    data = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def many_scans_of_many_pixels() -> bytes:
    return scans_of_a_size(7000, 7000, 20)


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


def tiff(*entries: tuple[int, int, int, int], order: str = "<") -> bytes:
    """A TIFF with these entries (tag, type, count, value) in its only directory, and 64 KB of
    0xFF."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    head = struct.pack(f"{order}IH", 8, len(entries))
    return mark + head + directory + bytes(4) + b"\xff" * 65_536


def long_entries() -> bytes:
    """All of them the same 60 KB."""
    return tiff(*((40_000 + each, 1, 60_000, 8) for each in range(900)), order=">")


def many_entries() -> bytes:
    return tiff(*((each, 3, 1, 0) for each in range(60_000)))


def many_strips() -> bytes:
    return tiff((279, 3, 100_000, 20))


def strips_over_one_another() -> bytes:
    return tiff((279, 3, 1000, 50))


@pytest.mark.parametrize(
    "make",
    [
        long_entries,
        many_entries,
        many_strips,
        strips_over_one_another,
        many_scans,
        many_scans_of_many_pixels,
        many_exif_parts,
        many_segments,
        many_profiles,
        many_chunks,
        run_lengths,
    ],
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
        saved("TIFF"),
        saved("TIFF", compression="tiff_lzw"),
        saved("AVIF", speed=10),
        saved("HEIF"),
    ],
    ids=[
        *("jpeg", "progressive, with profile and EXIF", "and a film"),
        *("png", "bmp", "webp", "gif", "tiff", "lzw", "avif", "heic"),
    ],
)
def test_ordinary_pictures_are_decoded(data: bytes) -> None:
    assert decode_image(data, Settings()).size == PICTURE.size


@pytest.mark.parametrize(
    ("pixels", "scans", "taken"),
    [
        (1.0, 12, True),
        (1.0, 13, False),
        (0.5, 24, True),
        (0.5, 26, False),
        (0.1, 100, True),
        (0.1, 101, False),
    ],
)
def test_scans_times_pixels_are_limited(pixels: float, scans: int, taken: bool) -> None:
    """Both by what the operator takes: a picture of a tenth of the pixels may have ten times as
    many scans, up to a hundred."""
    data = scans_of_a_size(200, 100, scans)
    settings = Settings(max_image_pixels=round(200 * 100 / pixels))
    if taken:
        assert decode_image(data, settings).size == (200, 100)
    else:
        with pytest.raises(SessionError, match="more than"):
            decode_image(data, settings)


def test_a_second_header_does_not_hide_the_pixels() -> None:
    """Wherever it stands, the size that counts is the largest."""
    data = scans_of_a_size(200, 100, 20)
    frame = data.index(b"\xff\xc2")
    length = 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    header = data[frame : frame + length]
    small = header[:5] + struct.pack(">HH", 10, 10) + header[9:]
    settings = Settings(max_image_pixels=200 * 100)
    for hidden in (
        data[:frame] + small + data[frame:],
        data[: frame + length] + small + data[frame + length :],
    ):
        with pytest.raises(SessionError, match="scans"):
            decode_image(hidden, settings)


def test_pictures_of_many_pixels_or_scans_are_large() -> None:
    def is_large(data: bytes) -> bool:
        return open_picture(data, Settings()).is_large

    assert is_large(scans_of_a_size(5000, 4000, 10))
    assert not is_large(scans_of_a_size(4000, 3000, 10))
    assert is_large(scans_of_a_size(4000, 3000, 40))


def a_long_comment() -> bytes:
    data = saved("GIF")
    comment = b"\x21\xfe" + (b"\xff" + b"a" * 255) * 30_000 + b"\0"
    return data[:13] + data[13:-1] + comment + data[-1:]


def compressed_text() -> bytes:
    data = saved("PNG")
    text = b"zTXtkey\0\0" + zlib.compress(bytes(20_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return data[:33] + chunk * 3 + data[33:]


def nested_exif() -> bytes:
    """A directory that is its own successor, and one tag that is said to be gigabytes long."""
    entry = struct.pack("<HHII", 0x0112, 2, 0xFFFFFFF0, 8)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 8)
    return saved("JPEG", exif=b"Exif\0\0" + tiff)


def an_animation() -> bytes:
    frames = [PICTURE.rotate(angle) for angle in range(100)]
    return saved("WEBP", save_all=True, append_images=frames)


@pytest.mark.parametrize(
    "make",
    [
        a_long_comment,
        compressed_text,
        nested_exif,
        an_animation,
        lambda: saved("JPEG", icc_profile=b"\xff" * 5_000_000),
        lambda: saved("WEBP", icc_profile=b"\xff" * 5_000_000, exif=bytes(1_000_000)),
        lambda: saved("BMP")[:10] + b"\xff\xff\xff\x7f" + saved("BMP")[14:],
    ],
    ids=["GIF text", "PNG text", "EXIF", "WebP frames", "ICC", "WebP parts", "BMP offset"],
)
def test_what_else_could_take_long_does_not(make: Callable[[], bytes]) -> None:
    """Decoded or refused, within time and memory of the order of the picture's own."""
    data = make()
    tracemalloc.start()
    began = time.process_time()
    try:
        with contextlib.suppress(SessionError):
            assert decode_image(data, Settings()).size == PICTURE.size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2.0
    assert peak < 100_000_000


def test_a_tiff_with_a_picture_file_inside_is_refused() -> None:
    with pytest.raises(SessionError, match="TIFF with compression 7; send it as JPEG"):
        decode_image(saved("TIFF", compression="jpeg"), Settings())


def test_a_file_that_is_cut_off_anywhere_is_decoded_or_refused_in_a_sentence() -> None:
    for data in (many_scans(), saved("PNG"), saved("BMP"), saved("TIFF"), saved("HEIF")):
        for length in range(0, min(len(data), 400)):
            with contextlib.suppress(SessionError):
                decode_image(data[:length], Settings())
