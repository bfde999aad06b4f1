"""What can go wrong with the embedded server before it serves, or when it dies."""

from __future__ import annotations


class ServerError(RuntimeError):
    """The server did not start, or died; the text is for the person who started it."""


class StartCrashError(ServerError):
    """The server was killed by a signal while it started: another start may go well."""
