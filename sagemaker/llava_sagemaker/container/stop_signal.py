"""SIGTERM and SIGINT: noted, and heeded at once where nothing can be lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """A signal broke off what `StopSignal.at_once` allowed it to."""


class StopSignal:
    """Takes over SIGTERM and SIGINT for the rest of the process's life. More of them than one
    change nothing."""

    def __init__(self) -> None:
        self.told = False
        """Whether one has come."""
        self._at_once = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises `Stopped`; elsewhere it is only noted."""
        try:
            self._at_once = True
            if self.told:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if self._at_once:
            self._at_once = False
            raise Stopped
