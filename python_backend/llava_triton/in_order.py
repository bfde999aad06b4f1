"""Jobs on worker threads; those of one session one after another, in the order they came."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

Job = Callable[[], None]
"""Tells itself how it ended; what it raises is logged."""


class InOrder:
    """Worker threads for jobs of many sessions.

    Args:
        workers: how many threads.
        most_waiting: jobs that may wait or run at once.
    """

    def __init__(self, workers: int, most_waiting: int) -> None:
        self._workers = ThreadPoolExecutor(max_workers=workers)
        self._most_waiting = most_waiting
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, deque[Job]] = {}
        """Jobs behind the one that runs, of every session that has one."""
        self._jobs = 0

    def submit(self, session: Hashable, job: Job, quick: bool = False) -> bool:
        """Run a job when the session's earlier ones have ended.

        Args:
            session: whose job it is.
            job: what to do.
            quick: takes no time; it is done at once, here, where no job of the session is before
                it, and is never one too many.

        Returns:
            False where too many jobs wait already; the job is not run then.
        """
        with self._lock:
            if not quick and self._jobs >= self._most_waiting:
                return False
            lane = self._lanes.get(session)
            if lane is not None:
                self._jobs += 1
                lane.append(job)
                return True
            if not quick:
                self._jobs += 1
                self._lanes[session] = deque()
                self._workers.submit(self._run, session, job)
                return True
        job()
        return True

    def shutdown(self) -> None:
        """Wait for all jobs."""
        self._workers.shutdown()

    def _run(self, session: Hashable, job: Job) -> None:
        while True:
            try:
                job()
            except Exception:
                log.exception("a job failed")
            with self._lock:
                self._jobs -= 1
                lane = self._lanes[session]
                if not lane:
                    del self._lanes[session]
                    return
                job = lane.popleft()
