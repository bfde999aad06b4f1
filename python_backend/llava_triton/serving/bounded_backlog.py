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
from collections.abc import Callable
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
        self._passed = 0
        self._taken_in = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._markers = ThreadPoolExecutor(1, "backlog")

    def pass_one(self) -> None:
        """Wait until one request more may be passed on; to be called just before that."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._passed - self._taken_in < 2 * WINDOW
            )
            self._passed += 1
            if self._passed % WINDOW == 0 and not self._stopped:
                self._markers.submit(self._mark, self._passed)

    def stop(self) -> None:
        """Hold nobody any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._markers.shutdown()

    def _mark(self, passed: int) -> None:
        try:
            self._reach()
        except Exception as error:  # one is dead: what is passed on gets errors, and nothing waits
            log.warning("the next models do not say what they have taken in: %s", error)
        with self._changed:
            self._taken_in = passed
            self._changed.notify_all()
