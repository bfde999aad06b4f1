"""The server's processes: do all live, and is their memory flat?"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.processes import Process, is_running, shared_memory_mib, with_descendants

SAMPLE_SECONDS = 2.0
ALLOWED_SHARE = 0.02
"""How much the last quarter's median may lie above the second quarter's."""
ALLOWED_MIB = 2.0
"""As much is allowed to a process at least: 2 % of a small one is a few pages of its allocator."""
JUDGED_SESSIONS = 2000
"""A shorter run is all warm-up: its growth is reported and not judged."""
SHARED_MEMORY = "/dev/shm"


class ProcessWatch:
    """A server's processes as they are now, and what has become of them.

    Args:
        server: tritonserver's process ID.
        others: of processes that belong to it, such as the adapter's.
    """

    def __init__(self, server: int, *others: int) -> None:
        self._server = server
        self._roots = (server, *others)
        self._known = self._processes()

    def dead(self) -> list[str]:
        """The processes that have ended; one that was started again in its place does not help."""
        return [f"{each.name} ({each.pid})" for each in self._known if not is_running(each.pid)]

    def pid_of(self, name: str) -> int:
        """The process of a model."""
        return next(process.pid for process in self._known if process.name == name)

    def memory(self) -> dict[str, float]:
        """Resident memory by process and the server's share of /dev/shm, in MiB.

        Raises:
            OSError, ProcessLookupError: a process has ended meanwhile.
        """
        mib = {process.name: process.resident_mib for process in self._processes()}
        return {**mib, SHARED_MEMORY: shared_memory_mib(self._server)}

    def _processes(self) -> list[Process]:
        return [process for root in self._roots for process in with_descendants(root)]


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, in MiB."""

    seconds: float
    """Since the clients began."""
    sessions: int
    """Held until then."""
    mib: dict[str, float]
    """Resident memory by process, and the server's share of /dev/shm."""


@dataclass(frozen=True)
class Growth:
    """How one part's memory went on, in MiB."""

    part: str
    second_quarter: float
    """Median."""
    last_quarter: float
    """Median."""
    per_thousand_sessions: float
    """Slope of the least-squares line over the last 70 % of the samples."""
    flat: bool
    """The last quarter's median is at most the second quarter's and what is allowed above it."""


class MemorySampler:
    """Samples a server's memory in a thread of its own until it is stopped."""

    def __init__(self, watch: ProcessWatch, sessions: Callable[[], int]) -> None:
        self.samples: list[Sample] = []
        self._watch = watch
        self._sessions = sessions
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stopping.wait(SAMPLE_SECONDS):
            try:
                mib = self._watch.memory()
            except (OSError, ProcessLookupError):  # one has gone: the watch will tell
                return
            self.samples.append(Sample(time.monotonic() - began, self._sessions(), mib))


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of every part and of all together; none from fewer than 8 samples."""
    if len(samples) < 8:
        return []
    parts = sorted(samples[-1].mib)
    lines = {part: [sample.mib.get(part, 0.0) for sample in samples] for part in parts}
    lines["all together"] = [sum(sample.mib.values()) for sample in samples]
    sessions = [sample.sessions for sample in samples]
    return [_growth(part, sessions, values) for part, values in lines.items()]


def _growth(part: str, sessions: Sequence[int], values: Sequence[float]) -> Growth:
    quarter, tail = len(values) // 4, int(len(values) * 0.3)
    before = statistics.median(values[quarter : 2 * quarter])
    after = statistics.median(values[-quarter:])
    slope = 0.0
    if len(set(sessions[tail:])) > 1:
        slope = statistics.linear_regression(sessions[tail:], values[tail:]).slope * 1000.0
    allowed = max(before * ALLOWED_SHARE, ALLOWED_MIB)
    return Growth(part, before, after, slope, after <= before + allowed)
