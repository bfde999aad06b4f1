"""Picture files that are small and cost minutes: known by their structure before the decoding."""

from __future__ import annotations

import math
import re
from typing import Literal

from llava_triton.contract.errors import SessionError, invalid

MOST_JPEG_SCANS = 100
"""However small the picture is."""
MOST_FULL_SIZE_SCANS = 12
"""Scans of a JPEG at the pixel limit. Each goes over all pixels again (50 million take 0.06 s), and
a progressive file has about ten. A picture of half the pixels may have twice as many."""
MOST_JPEG_SEGMENTS = 2000
MOST_EXIF_SEGMENTS = 16
"""Pillow joins them one by one, copying all before."""
MOST_PNG_CHUNKS = 50_000
MOST_TIFF_ENTRIES = 1000
MOST_TIFF_PARTS = 50_000
"""Strips or tiles: Pillow makes an object for each."""
_TIFF_COMPRESSION = 259
_TIFF_PACKINGS = (1, 2, 3, 4, 5, 8, 32773, 32946)
"""None, fax, LZW, Deflate, run lengths. What is a picture file of its own inside is not taken."""
_TIFF_PARTS = (279, 325)
"""Tags: how long each strip or tile is."""
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of a value by its type."""
_BMP_HEADER, _BMP_COMPRESSION = slice(14, 18), slice(30, 34)
_BMP_WITH_COMPRESSION = 40
"""The header's size, from which on it says how the pixels are packed."""
_RUN_LENGTHS = (1, 2)
"""Their decoder is written in Python."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""In what follows a scan's header, 0xFF stands before a zero or a restart in all other places."""
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_ALONE = (0x01, 0xD8)
"""Markers without a length."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the header that has the picture's size."""


def refuse_bombs(data: bytes, max_pixels: int) -> int:
    """Refuse files that no camera or program writes and whose decoding takes long.

    Args:
        data: the file.
        max_pixels: that a picture may have.

    Returns:
        How often the decoder goes over the pixels: a JPEG's scans; 1 for other formats.

    Raises:
        SessionError: INVALID_ARG; its sentence lacks a subject.
    """
    if data.startswith(b"\xff\xd8"):
        return _check_jpeg(data, max_pixels)
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"BM"):
        header, compression = (
            int.from_bytes(data[each], "little") for each in (_BMP_HEADER, _BMP_COMPRESSION)
        )
        if header >= _BMP_WITH_COMPRESSION and compression in _RUN_LENGTHS:
            raise _refused("is a BMP with run lengths")
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)
    return 1


def _check_jpeg(data: bytes, max_pixels: int) -> int:
    position = scans = exif = pixels = 0
    for _ in range(MOST_JPEG_SEGMENTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None or found[1][0] == _END:
            return scans
        marker, position = found[1][0], found.end()
        if marker in _ALONE:
            continue
        scans += marker == _SCAN
        exif += marker == _EXIF and data.startswith(b"Exif", position + 2)
        if marker in _FRAMES:
            pixels = max(pixels, _frame_pixels(data, position))
        if scans > MOST_JPEG_SCANS or exif > MOST_EXIF_SEGMENTS:
            most = f"{MOST_JPEG_SCANS} scans or {MOST_EXIF_SEGMENTS} EXIF parts"
            raise _refused(f"is a JPEG with more than {most}")
        # One of more pixels than are taken is refused for that, once it is opened.
        most_scans = MOST_FULL_SIZE_SCANS * max_pixels // max(1, min(pixels, max_pixels))
        if scans > most_scans:
            raise _refused(f"is a JPEG of {pixels} pixels with more than {most_scans} scans")
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise _refused(f"is a JPEG with more than {MOST_JPEG_SEGMENTS} segments")


def _frame_pixels(data: bytes, position: int) -> int:
    """Height times width, behind a frame header's length and precision."""
    sides = (data[position + each : position + each + 2] for each in (3, 5))
    return math.prod(int.from_bytes(side, "big") for side in sides)


def _check_png(data: bytes) -> None:
    position, profiles = 8, 0
    for _ in range(MOST_PNG_CHUNKS):
        if position + 8 > len(data):
            return
        size = int.from_bytes(data[position : position + 4], "big")
        profiles += data.startswith(b"iCCP", position + 4)
        if profiles > 1:  # each is unpacked
            raise _refused("is a PNG with more than one colour profile")
        position += 12 + size
    raise _refused(f"is a PNG with more than {MOST_PNG_CHUNKS} chunks")


def _check_tiff(data: bytes) -> None:
    """The first directory, the only one that is read: its values and its strips or tiles are each
    no longer together than the file (they may lie over one another), and there are not too many."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"

    def numbers(start: int, size: int, count: int = 1) -> list[int]:
        ends = range(start + size, start + size * count + 1, size)
        return [int.from_bytes(data[end - size : end], order) for end in ends]

    (directory,) = numbers(4, 4)
    (entries,) = numbers(directory, 2)
    if entries > MOST_TIFF_ENTRIES:
        raise _refused(f"is a TIFF with more than {MOST_TIFF_ENTRIES} entries")
    values = parts = 0
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        (tag, kind), (count,) = numbers(entry, 2, 2), numbers(entry + 4, 4)
        size = _TIFF_SIZES.get(kind, 0)
        values += count * size
        place = entry + 8 if count * size <= 4 else numbers(entry + 8, 4)[0]
        if tag == _TIFF_COMPRESSION and (packed := numbers(place, 2)[0]) not in _TIFF_PACKINGS:
            raise invalid(f"is a TIFF with compression {packed}; send it as JPEG or PNG")
        if tag in _TIFF_PARTS:
            if count > MOST_TIFF_PARTS:
                raise _refused(f"is a TIFF of more than {MOST_TIFF_PARTS} parts")
            parts += sum(numbers(place, size, count)) if size else 0
    if max(values, parts) > len(data):
        raise _refused("is a TIFF whose parts are longer than the file")


def _refused(fault: str) -> SessionError:
    return invalid(f"{fault}, which takes too long to decode; save it anew, as PNG for example")
