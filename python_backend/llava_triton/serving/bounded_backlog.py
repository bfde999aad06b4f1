"""How far image_encoder may run ahead of the models that come next.

Triton 2.51 makes one object (`Payload`) for each request that waits for a model and keeps the first
1,000 of them for reuse. Once more than that have waited at the same time, its dynamic batcher frees
such an object while it holds the lock inside, unlocks freed memory, and so corrupts the server's
heap (`benchmarks/payload_backlog.py` shows it). A model with `dynamic_batching` never has more than
a few of these objects. A sequence batcher has as many as there are requests; so what waits there is
bounded by what is let through to it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

WINDOW = 128
"""After so many requests the next models are asked whether they have taken them in."""


class BoundedBacklog:
    """Lets requests on to the next models, about `2 * WINDOW` more than they have taken in.

    Args:
        reach: returns when they have taken in everything that was passed on before. Called by one
            thread.
    """

    def __init__(self, reach: Callable[[], None]) -> None:
        self._reach = reach
        self._lanes: deque[Hashable] = deque()
        """Of the requests that were passed on and not taken in yet, in order."""
        self._by_lane: Counter[Hashable] = Counter()
        """How many of them there are."""
        self._since_mark = 0
        """Those that were passed on since the next models were asked last."""
        self._marks = 0
        """Questions that are not answered yet."""
        self._stopped = False
        self._changed = threading.Condition()
        self._markers = ThreadPoolExecutor(1, "backlog")

    def pass_one(self, lane: Hashable) -> None:
        """Wait until one request more may be passed on; to be called just before that.

        Args:
            lane: what it belongs to, such as a session.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._lanes) < 2 * WINDOW)
            self._lanes.append(lane)
            self._by_lane[lane] += 1
            self._since_mark += 1
            if self._since_mark >= WINDOW:
                self._ask()

    def is_full(self, lane: Hashable, most: int) -> bool:
        """Whether so many requests of a lane were passed on and have not been taken in."""
        with self._changed:
            if self._by_lane[lane] < most:
                return False
            if not self._marks:  # else nobody would hear of it before others have come
                self._ask()
            return True

    def stop(self) -> None:
        """Hold nobody any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._markers.shutdown()

    def _ask(self) -> None:
        """Ask the next models; the lock is held."""
        if not self._stopped:
            self._markers.submit(self._mark, self._since_mark)
            self._marks += 1
            self._since_mark = 0

    def _mark(self, passed: int) -> None:
        try:
            self._reach()
        except Exception as error:  # one is dead: what is passed on gets errors, and nothing waits
            log.warning("the next models do not say what they have taken in: %s", error)
        with self._changed:
            for _ in range(passed):
                lane = self._lanes.popleft()
                self._by_lane[lane] -= 1
                if not self._by_lane[lane]:
                    del self._by_lane[lane]
            self._marks -= 1
            self._changed.notify_all()
