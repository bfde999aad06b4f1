"""`python -m llava_triton.pictures.video_child`: decodes videos that strangers sent, in a process
of its own.

FFmpeg's decoders are C code that cannot be interrupted from a thread. Here one that hangs, crashes
or asks for all memory costs this process, and the video that it was given. This file knows nothing
of the server: it reads videos from its standard input and writes frames to its standard output.

    asked      a line of JSON, see `Question`, then the file
    answered   of each frame a line {"width", "height"}, then RGB bytes [H, W, 3]
               {"again": true}: forget these frames, others follow
               at last {"done": true} or {"fault": "a sentence that lacks a subject"}
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np

DECODERS = frozenset(
    (
        *("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d"),
        *("mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "gif"),
    )
)
"""FFmpeg has hundreds; each is one more parser to attack."""
MOST_FRAMES = 100_000
"""Of a file: an index may name one sample a billion times."""
MEMORY_BYTES = 1536 * 1024 * 1024
"""Address space beside what the libraries take: frames that refer to one another, of 4K pixels."""
MISSING = 0.9
"""A file that has fewer of the frames that its header speaks of is cut off."""


@dataclass(frozen=True)
class Question:
    """One video, and how much of it is wanted."""

    size: int
    """Bytes of the file that follows."""
    container: str
    """FFmpeg's name: nothing else is tried, least of all what opens other files (HLS, DASH)."""
    frames: int
    """That are wanted, evenly over the video; all that it has, where it has fewer."""
    max_pixels: int
    """Of a frame."""
    max_seconds: float
    """Of the video."""


class FaultError(Exception):
    """What is wrong with a video."""


def main() -> None:
    """Answer until standard input ends."""
    asked = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints
    av.logging.set_level(av.logging.PANIC)
    _limit_oneself()
    while line := asked.readline():
        question = Question(**json.loads(line))
        _limit_time(question.max_seconds)
        _answer(question, asked.read(question.size), answers)
        answers.flush()


def _limit_oneself() -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, taken + MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(kind, (most, most))


def _limit_time(seconds: float) -> None:
    """Where nobody is left to end this process, the system does."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 60
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _answer(question: Question, data: bytes, answers: BinaryIO) -> None:
    try:
        for frame in _sampled(question, data):
            if frame is None:
                _say(answers, again=True)
                continue
            _say(answers, width=frame.shape[1], height=frame.shape[0])
            answers.write(np.ascontiguousarray(frame).data)
        _say(answers, done=True)
    except FaultError as error:
        _say(answers, fault=str(error))
    except BrokenPipeError:
        raise
    except MemoryError:
        _say(answers, fault="takes too much memory to decode; scale it down or encode it anew")
    except Exception as error:  # a malformed file can raise nearly anything
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:100]
        _say(answers, fault=f"is damaged or cut off ({reason}); send the whole file")


def _say(answers: BinaryIO, **told: Any) -> None:
    answers.write(json.dumps(told).encode() + b"\n")


def _sampled(question: Question, data: bytes) -> Iterator[np.ndarray | None]:
    """Frames uint8 [H, W, 3]. None: forget those before, they were chosen by a wrong count."""
    total = _count(question, data)
    while True:
        seen = 0
        # As transformers samples: the first frame of each of so many equal parts.
        count = min(question.frames, total)
        wanted = [number * total // count for number in range(count)]
        with _opened(question, data) as container:
            for frame in container.decode(_stream(container)):
                if frame.width * frame.height > question.max_pixels:
                    raise _too_large(frame.width, frame.height, question)
                if seen == wanted[0]:
                    yield _rgb(frame)
                    wanted.pop(0)
                seen += 1
                if not wanted:
                    return
        if not seen:
            raise FaultError("has no frame that can be decoded; send another file")
        total = seen  # some of its packets hold no frame
        yield None


def _count(question: Question, data: bytes) -> int:
    """How many frames a video has, by its packets: headers may say anything, or nothing."""
    with _opened(question, data) as container:
        stream = _stream(container)
        context = stream.codec_context
        if context.width * context.height > question.max_pixels:
            raise _too_large(context.width, context.height, question)
        _check_seconds(_seconds(container, stream), question)
        count, last = 0, 0.0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > MOST_FRAMES:
                raise FaultError(f"has more than {MOST_FRAMES} frames; send a shorter one")
            if packet.pts is not None and packet.time_base is not None:
                last = max(last, float(packet.pts * packet.time_base))
        _check_seconds(last, question)
        if not count:
            raise FaultError("has no frames: it is empty or cut off; send the whole file")
        if count < MISSING * stream.frames:
            raise FaultError(
                f"is damaged or cut off: it has {count} of the {stream.frames} frames that its "
                "header speaks of; send the whole file"
            )
    return count


def _opened(question: Question, data: bytes) -> Any:
    return av.open(
        io.BytesIO(data),
        format=question.container,
        options={"protocol_whitelist": "none", "enable_drefs": "0"},
        metadata_errors="ignore",
    )


def _stream(container: Any) -> Any:
    # A song's cover is no video.
    streams = [
        each
        for each in container.streams.video
        if not each.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        kinds = sorted({each.type for each in container.streams}) or ["no"]
        raise FaultError(f"has no video stream, only {' and '.join(kinds)} ones; send a video")
    stream = streams[0]
    context = stream.codec_context
    if context is None or context.codec.name not in DECODERS:
        name = "unknown" if context is None else context.codec.name
        raise FaultError(
            f"is encoded by the codec {name}, which is not decoded here; use H.264 or VP9"
        )
    context.thread_type = "NONE"
    context.thread_count = 1  # as all decoders: the cores are others', too
    return stream


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _check_seconds(seconds: float, question: Question) -> None:
    if seconds > question.max_seconds:
        raise FaultError(
            f"is {seconds:.0f} s long; the limit is {question.max_seconds:.0f} s: send a part of it"
        )


def _too_large(width: int, height: int, question: Question) -> FaultError:
    return FaultError(
        f"has frames of {width} x {height} pixels; the limit is {question.max_pixels} pixels: "
        "scale it down"
    )


def _rgb(frame: Any) -> np.ndarray:
    """A frame as a person sees it: what is transparent on white, and turned as the file says."""
    if any(each.is_alpha for each in frame.format.components) or frame.format.has_palette:
        pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = pixels[..., 3:]
        rgb = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    return np.rot90(rgb, round(frame.rotation / 90) % 4)


if __name__ == "__main__":
    main()
