"""Frames of video files, by a process that may be lost: see `llava_triton.pictures.video_child`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, TypeVar

import numpy as np

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import VIDEO
from llava_triton.contract.settings import Settings
from llava_triton.pictures.formats import container_of

log = logging.getLogger(__name__)
Made = TypeVar("Made")
CHILD = ("-m", "llava_triton.pictures.video_child")
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""The child computes nothing; each thread of these libraries takes address space."""
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL")
"""Of our own environment, whose other variables may be secrets."""


class VideoDecoder:
    """Decodes one video after another by a child process, which is kept warm.

    A video that takes longer than `max_video_decode_seconds`, or that ends the child, is refused.
    The next one gets a new child, which takes half a second to start. Not for several threads.

    Args:
        settings: limits.
        child: arguments of the Python that is the child.
    """

    def __init__(self, settings: Settings, child: Sequence[str] = CHILD) -> None:
        self._settings = settings
        self._arguments = child
        self._child: subprocess.Popen[bytes] | None = None

    def frames(self, data: bytes, wanted: int, make: Callable[[np.ndarray], Made]) -> list[Made]:
        """What is made of the frames of a video, evenly over its length.

        Args:
            data: the file.
            wanted: how many; where it has fewer, all of them.
            make: called with each, uint8 [H, W, 3], so that only one is kept whole.

        Raises:
            SessionError: INVALID_ARG, about `video`; its sentence lacks a subject.
        """
        if importlib.util.find_spec("av") is None:
            raise _refused(
                "is a video file, and this server has no PyAV to decode it (the extra `video`); "
                "send its frames"
            )
        seconds = self._settings.max_video_decode_seconds
        began = time.monotonic()
        child = self._child = self._child or _start(self._arguments)
        deadline = threading.Timer(seconds, child.kill)
        deadline.start()
        try:
            outcome = self._ask(child, data, wanted, make)
        except (OSError, ValueError) as error:  # the child's end, or half an answer
            self.close()
            if time.monotonic() - began >= seconds:
                raise _refused(
                    f"takes longer than {seconds:.0f} s to decode; send a shorter or smaller one"
                ) from None
            log.warning("a video ended its decoder: %s", error)
            raise _refused("ended its decoder, so it is damaged; encode it anew") from None
        except BaseException:
            self.close()  # it is in the middle of an answer
            raise
        finally:
            deadline.cancel()
            deadline.join()  # so that no child is ended for the video before
        if isinstance(outcome, str):
            raise _refused(outcome)
        return outcome

    @property
    def pid(self) -> int | None:
        """Of the child; None where there is none."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()  # closes its pipes, too

    def _ask(
        self,
        child: subprocess.Popen[bytes],
        data: bytes,
        wanted: int,
        make: Callable[[np.ndarray], Made],
    ) -> list[Made] | str:
        """What was made, or what is wrong with the video.

        Raises:
            OSError, ValueError: the child has ended.
        """
        asked, answers = child.stdin, child.stdout
        assert asked is not None
        assert answers is not None
        question = {
            "size": len(data),
            "container": container_of(data),
            "frames": wanted,
            "max_pixels": self._settings.max_video_pixels,
            "max_seconds": self._settings.max_video_seconds,
        }
        asked.write(json.dumps(question).encode() + b"\n")
        asked.write(data)
        asked.flush()
        made: list[Made] = []
        while True:
            told = json.loads(answers.readline())
            if "fault" in told:
                return str(told["fault"])
            if "done" in told:
                return made
            if "again" in told:
                made.clear()
                continue
            shape = (told["height"], told["width"], 3)
            pixels = np.frombuffer(_read(answers, shape[0] * shape[1] * shape[2]), dtype=np.uint8)
            made.append(make(pixels.reshape(shape)))


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    # Inside of Triton's process this is not always Python's own file.
    python = sys.executable if "python" in sys.executable else shutil.which("python3")
    return subprocess.Popen(
        [python or "python3", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT if name in os.environ} | _ENVIRONMENT,
    )


def _read(answers: IO[bytes], size: int) -> bytearray:
    """Raises OSError: the child has ended before."""
    pixels = bytearray(size)
    if answers.readinto(pixels) != size:  # type: ignore[attr-defined]
        raise OSError("it ended in the middle of a frame")
    return pixels


def _refused(sentence: str) -> SessionError:
    return invalid(sentence, VIDEO.name)
