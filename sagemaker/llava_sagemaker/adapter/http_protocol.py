"""uvicorn's HTTP, with limits on what a connection may send and how long it may take."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
"""Of a request: its first line, its headers, and the trailers behind a chunked body. httptools
itself knows no limit."""
HEADER_SECONDS = 10.0
"""For a connection's first bytes, and for all headers of a request from their first byte on."""
LINGER_SECONDS = 5.0
"""A request that was answered before all of it had come may go on so long: closing the connection
at once could keep the answer from the client."""
MOST_PIPELINED = 16
"""Requests that a connection may send before the one in flight is answered."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\n"
    b"connection: close\r\n\r\n%b"
)


class _RefusedError(Exception):
    """Ends the reading of a connection."""


class GuardedProtocol(HttpToolsProtocol):
    """Closes connections that dawdle or send too much: each would hold memory and a file
    descriptor."""

    _deadline: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None
    _header_bytes = 0
    """Of the request that is being read."""
    _unread_bytes = 0
    """That have come since something was complete: a header, a chunk."""
    _in_body = False
    """The request's headers have come, and not yet its end."""

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._give_time()

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        """A request's first line has come."""
        super().on_message_begin()
        self._header_bytes = self._unread_bytes = 0
        self._give_time()

    def on_url(self, url: bytes) -> None:
        """The address that is asked for, or a part of it."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which means nothing to us."""
        self._count(len(name) + len(value))
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's headers have come."""
        self._stop_clock()
        self._in_body = True
        if len(self.pipeline) >= MOST_PIPELINED:
            raise _RefusedError
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of a request has come."""
        self._in_body = False
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request was answered."""
        super().on_response_complete()
        if self._in_body and self.cycle.response_complete:
            self._lingering = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """What came is no request that is read on."""
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse()
        elif self.cycle is not None and self.cycle.response_started and self._in_body:
            self.transport.close()  # in the middle of an answer
        else:
            super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._stop_clock()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    def _count(self, size: int) -> None:
        self._unread_bytes = 0
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _RefusedError

    def _refuse(self) -> None:
        # An answer in flight must not get another one inside of it.
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            told = (
                f"the request has more than {MAX_HEADER_BYTES} bytes besides its body; send fewer "
                "headers"
            ).encode()
            self.transport.write(_TOO_LARGE % (len(told), told))
        self.transport.close()

    def _give_time(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
