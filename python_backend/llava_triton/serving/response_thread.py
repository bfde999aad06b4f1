"""Sends pieces of answers beside the engine's thread, fewer and larger ones under load.

Triton's streaming path takes a few thousand responses per second, whatever the number of streams.
So each stream has a share of what it takes, and tokens that come sooner wait for one another.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError

log = logging.getLogger(__name__)

RESPONSES_PER_SECOND = 1500
"""What all streams together may send: well below the 4,000 at which two cores have no time left."""
LONGEST_HOLD_SECONDS = 0.03
"""No piece waits longer for the next one."""


class Stream(Protocol):
    """Where the pieces of one answer go."""

    def send(self, event: Delta | SessionError) -> None:
        """Send a piece, or the error that ends the answer."""

    def give_up(self) -> None:
        """A piece could not be sent: end the answer if that is possible."""


@dataclass
class _Outgoing:
    """One stream's state."""

    held: Delta | None = None
    sent_at: float = 0.0
    tokens_sent: int = 0


class ResponseThread:
    """Sends every stream's pieces in order; the first token and the end at once."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Stream, Delta | SessionError] | None]
        self._queue = queue.SimpleQueue()
        self._streams: dict[Stream, _Outgoing] = {}
        """Those that have begun and not ended."""
        self._holding: set[Stream] = set()
        self._thread = threading.Thread(target=self._run, name="responses", daemon=True)
        self._thread.start()

    def put(self, stream: Stream, event: Delta | SessionError) -> None:
        """Send `event` after everything put before it for the same stream."""
        self._queue.put((stream, event))

    def stop(self) -> None:
        """Send what is left, then end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            going = self._take()
            now = time.monotonic()
            for stream in [each for each in self._holding if now >= self._due(each)]:
                self._flush(stream)
        for stream in list(self._holding):
            self._flush(stream)

    def _take(self) -> bool:
        """Take what has been put, waiting for it until a held piece is due; False at the end."""
        timeout = None
        if self._holding:
            due = min(self._due(stream) for stream in self._holding)
            timeout = max(0.0, due - time.monotonic())
        try:
            item = self._queue.get(timeout=timeout)
            while item is not None:
                self._accept(*item)
                item = self._queue.get_nowait()
        except queue.Empty:
            return True
        return False

    def _accept(self, stream: Stream, event: Delta | SessionError) -> None:
        state = self._streams.setdefault(stream, _Outgoing())
        if isinstance(event, SessionError):
            self._flush(stream)
            self._send(stream, event)
            self._streams.pop(stream, None)
            return
        held = state.held
        state.held = event if held is None else ANSWER.joined((held, event))
        self._holding.add(stream)
        if event.is_final or state.tokens_sent == 0:
            self._flush(stream)
        if event.is_final:
            self._streams.pop(stream, None)

    def _due(self, stream: Stream) -> float:
        share = len(self._streams) / RESPONSES_PER_SECOND
        return self._streams[stream].sent_at + min(share, LONGEST_HOLD_SECONDS)

    def _flush(self, stream: Stream) -> None:
        self._holding.discard(stream)
        state = self._streams.get(stream)
        if state is None or state.held is None:
            return
        event, state.held = state.held, None
        self._send(stream, event)
        state.sent_at, state.tokens_sent = time.monotonic(), event.num_output_tokens

    def _send(self, stream: Stream, event: Delta | SessionError) -> None:
        try:
            stream.send(event)
        except Exception:
            log.exception("a response could not be sent")
            stream.give_up()
