"""Small video files, made by PyAV, and what can be wrong with them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

CODECS = {
    "mp4": ("libx264", "yuv420p"),
    "mov": ("mpeg4", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "vp8": ("libvpx", "yuv420p"),
    "matroska": ("libx264", "yuv420p"),
    "gif": ("gif", "rgb8"),
}
"""Codec and layout of pixels, by container; "vp8" is WebM, too."""


def shades(count: int, width: int = 64, height: int = 48, step: int = 10) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] of one grey each, so that a frame tells which it is."""
    return [np.full((height, width, 3), step * number, np.uint8) for number in range(count)]


def noise(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Frames whose every pixel matters."""
    generator = np.random.default_rng(width)
    return list(generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def clip(
    frames: Sequence[np.ndarray],
    container: str = "mp4",
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
) -> bytes:
    """A video file.

    Args:
        frames: uint8 [H, W, 3] each.
        container: a key of `CODECS`.
        rate: frames a second.
        times: seconds of each frame, where they are not equally far apart.
    """
    file = io.BytesIO()
    codec, layout = CODECS[container]
    with av.open(file, "w", format="webm" if container == "vp8" else container) as output:
        stream: Any = output.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = layout
        base = Fraction(1, 1000)
        if times is not None:
            stream.codec_context.time_base = base
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=layout)
            if times is not None:
                frame.time_base, frame.pts = base, int(times[number] * 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 file with sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def with_number(file: bytes, atom: bytes, offset: int, value: int) -> bytes:
    """An MP4 file with another 32-bit number in the first atom of a name.

    Args:
        file: all of it.
        atom: its name.
        offset: of the number, behind the name.
        value: the number.
    """
    place = file.index(atom) + len(atom) + offset
    return file[:place] + value.to_bytes(4, "big") + file[place + 4 :]


def with_frames_in_header(file: bytes, count: int) -> bytes:
    """An MP4 file whose tables speak of so many frames."""
    return with_number(with_number(file, b"stsz", 8, count), b"stts", 8, count)


def with_large_frames(file: bytes, width: int, height: int) -> bytes:
    """A WebM file of VP8 whose first frame says that it is so large."""
    place = file.index(b"\x9d\x01\x2a") + 3
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return file[:place] + size + file[place + 4 :]


def turned(file: bytes) -> bytes:
    """An MP4 file that says it is to be turned clockwise by 90 degrees, as telephones write it."""
    for number, value in enumerate((0, 1 << 16, 0, (1 << 32) - (1 << 16), 0)):
        file = with_number(file, b"tkhd", 40 + 4 * number, value)
    return file
