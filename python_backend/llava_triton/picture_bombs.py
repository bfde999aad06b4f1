"""Picture files that are small and cost minutes: known by their structure before the decoding."""

from __future__ import annotations

import re

from llava_triton.errors import SessionError, invalid

MOST_JPEG_SCANS = 100
"""Each goes over all pixels again; a progressive file has about ten."""
MOST_JPEG_SEGMENTS = 2000
MOST_EXIF_SEGMENTS = 16
"""Pillow joins them one by one, copying all before."""
MOST_PNG_CHUNKS = 50_000
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


def refuse_bombs(data: bytes) -> None:
    """Refuse files that no camera or program writes and whose decoding takes long.

    Raises:
        SessionError: INVALID_ARG; its sentence lacks a subject.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"BM"):
        header, compression = (
            int.from_bytes(data[each], "little") for each in (_BMP_HEADER, _BMP_COMPRESSION)
        )
        if header >= _BMP_WITH_COMPRESSION and compression in _RUN_LENGTHS:
            raise _refused("is a BMP with run lengths")


def _check_jpeg(data: bytes) -> None:
    position = scans = exif = 0
    for _ in range(MOST_JPEG_SEGMENTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            return
        marker, position = found[1][0], found.end()
        if marker == _END:
            return
        if marker in _ALONE:
            continue
        scans += marker == _SCAN
        exif += marker == _EXIF and data.startswith(b"Exif", position + 2)
        if scans > MOST_JPEG_SCANS or exif > MOST_EXIF_SEGMENTS:
            most = f"{MOST_JPEG_SCANS} scans or {MOST_EXIF_SEGMENTS} EXIF parts"
            raise _refused(f"is a JPEG with more than {most}")
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise _refused(f"is a JPEG with more than {MOST_JPEG_SEGMENTS} segments")


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


def _refused(fault: str) -> SessionError:
    return invalid(f"{fault}, which takes too long to decode; save it anew, as PNG for example")
