"""A Triton server that has crashed, and yet does not end.

tritonserver's handler of SIGSEGV and SIGABRT prints a stack trace before it ends the process, and
takes memory for that. Where the crash was found by `malloc` itself, with its lock held, the handler
waits for this lock for ever (seen with 2.51): the process stays, some of its threads even answer.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

_SAYS = re.compile(rb"^Signal \((\d+)\) received\.", re.MULTILINE)
"""What the handler prints first."""


class CrashHandler:
    """Looks whether a server has got stuck in its handler.

    Args:
        process: the server's ID.
        log: file descriptor of its log.
        start: where in the log its own output begins, in bytes.
    """

    def __init__(self, process: int, log: int, start: int) -> None:
        self._process = process
        self._log = log
        self._seen = start

    def caught(self) -> signal.Signals | None:
        """The signal in whose handler the server has been seen since the last look; None: none."""
        said = self._said()
        # The log is the models', too: what it says is not believed without a look.
        return next((each for each in said if _is_handling(self._process, each)), None)

    def _said(self) -> set[signal.Signals]:
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, max(0, size - self._seen), self._seen)
        whole = text[: text.rfind(b"\n") + 1]
        self._seen += len(whole)
        numbers = {int(match[1]) for match in _SAYS.finditer(whole)}
        return {each for each in _FATAL if each in numbers}


_FATAL = {signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}


def _is_handling(process: int, number: signal.Signals) -> bool:
    """Whether a thread of a process has a signal blocked, as a handler has its own."""
    for status in Path(f"/proc/{process}/task").glob("*/status"):
        try:
            text = status.read_text()
        except OSError:  # the thread has ended
            continue
        blocked = re.search(r"^SigBlk:\s*([0-9a-f]+)$", text, re.MULTILINE)
        if blocked and int(blocked[1], 16) >> (number - 1) & 1:
            return True
    return False
