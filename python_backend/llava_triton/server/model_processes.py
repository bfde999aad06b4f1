"""The processes of Triton's Python models, which nobody else looks after.

Triton does not notice that one has died: it calls itself and the model ready, every request to the
model fails, and answers in flight fall silent. It takes one that has not moved for a second for
dead, frees what its requests hold, and crashes when the process goes on and answers them (seen with
2.51). So neither can be waited out: the server is of no use any more, and is to be started again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

FROZEN_SECONDS = 0.7
"""Less than the second after which Triton takes a process for dead, by the time between looks."""


class ModelProcesses:
    """The models' processes of one server, noted while it is well.

    Args:
        processes: process ID -> model.
    """

    def __init__(self, processes: Mapping[int, str]) -> None:
        self._processes = dict(processes)
        self._stopped_at: dict[int, float] = {}
        """When a process that is stopped was first seen so, by the monotonic clock."""

    def fault(self) -> str | None:
        """What has happened to one of them: "the process of MODEL has died (signal 9)".

        None while all are well. To be asked a few times a second.
        """
        now = time.monotonic()
        for process, model in self._processes.items():
            state, status = process_state(process)
            if state in _DEAD:
                return f"the process of {model} has died ({_cause(status)})"
            if state not in _STOPPED:
                self._stopped_at.pop(process, None)
            elif now - self._stopped_at.setdefault(process, now) >= FROZEN_SECONDS:
                return f"the process of {model} is stopped, and would not survive going on"
        return None


_DEAD = "ZX"
_STOPPED = "Tt"
"""By a signal, by a debugger."""


def process_state(process: int) -> tuple[str, int | None]:
    """The letter of proc(5) for a process's state, X where there is none; and, once it has ended,
    its wait status where the kernel tells us."""
    try:
        # Behind the name, which may hold spaces and parentheses.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", None
    return fields[0], int(fields[-1]) if fields[0] in _DEAD else None


def is_dead(process: int) -> bool:
    """Whether a process has ended, if need be without its parent's knowing yet."""
    return process_state(process)[0] in _DEAD


def _cause(status: int | None) -> str:
    if status is None:
        return "nobody knows how"
    number = status & 0x7F
    return f"signal {number}" if number else f"exit status {status >> 8}"
