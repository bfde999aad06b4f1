"""Pictures on their way to the store, from the process that has them as they were sent."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime

from llava_triton.journal.background import Background
from llava_triton.journal.records import picture_object, picture_path
from llava_triton.journal.store import Store, StoreError

log = logging.getLogger(__name__)

MOST_BYTES = 256 * 1024 * 1024
"""Of pictures that wait to be written; those beyond are not, and neither are their sessions."""
TRIES = 8
"""Of a picture, in half a minute; its record gives up then, too."""


class PictureWriter:
    """Writes pictures behind the answers about them.

    Args:
        store: where to.
        background: the event loop that waits for it.
    """

    def __init__(self, store: Store, background: Background) -> None:
        self._store = store
        self._background = background
        self._lock = threading.Lock()
        self._bytes = 0
        self.written = 0
        self.dropped = 0
        """Pictures that were not written."""
        self._running: set[Future[None]] = set()

    def keep(self, key: str, name: str, item: bytes) -> None:
        """Write a picture of a session; from any thread, at once.

        Args:
            key: the session's.
            name: the digest of the picture's features.
            item: the picture as it was sent.
        """
        with self._lock:
            if self._bytes + len(item) > MOST_BYTES:
                self.dropped += 1
                return
            self._bytes += len(item)
        running = self._background.run(self._write(key, name, item))
        with self._lock:
            self._running.add(running)
        running.add_done_callback(self._ended)

    def close(self, seconds: float) -> None:
        """Write what is not written yet, as far as that is soon."""
        with self._lock:
            running = list(self._running)
        for each in running:
            try:
                each.result(seconds)
            except NotInTime:
                log.error("the journal's store is down or slow: pictures are not written")
                return

    async def _write(self, key: str, name: str, item: bytes) -> None:
        written, pause = False, 0.1
        try:
            for _ in range(TRIES):
                try:
                    await self._store.replace(picture_path(key, name), picture_object(item))
                    written = True
                    return
                except StoreError as error:
                    problem = error
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10.0)
            log.warning("a picture of the journal was not written: %s", problem)
        finally:
            with self._lock:
                self._bytes -= len(item)
                self.written += written
                self.dropped += not written

    def _ended(self, running: Future[None]) -> None:
        with self._lock:
            self._running.discard(running)
