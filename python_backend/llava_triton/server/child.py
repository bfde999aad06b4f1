"""A child process that does not outlive its parent, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def start_child(
    command: Sequence[str], stdin: int | IO[bytes] = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a process that is killed when this one ends, and that signals to our group, such as a
    terminal's Ctrl-C, do not reach."""
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        command, stdin=stdin, start_new_session=True, preexec_fn=die_with_parent
    )
