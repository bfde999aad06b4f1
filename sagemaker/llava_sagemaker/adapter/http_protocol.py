"""uvicorn's HTTP, which does not wait for ever for a request's headers."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
"""Of a request; httptools itself knows no limit."""
HEADER_SECONDS = 10.0
"""For a connection's first bytes, and for all headers of a request from their first byte on."""


class GuardedProtocol(HttpToolsProtocol):
    """Closes connections that dawdle: each would hold memory and a file descriptor."""

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._give_time()

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        super().data_received(data)
        if self._deadline is not None:  # headers, so far
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first line has come."""
        super().on_message_begin()
        self._give_time()

    def on_headers_complete(self) -> None:
        """A request's headers have come."""
        self._stop_clock()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._stop_clock()
        super().connection_lost(exc)

    def _give_time(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._header_bytes = 0
