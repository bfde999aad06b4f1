"""The errors a client can get.

One class with a code, because what a caller does about an error depends on its code alone; the
sentence is for the person who reads it.
"""

from __future__ import annotations

from enum import Enum


class ErrorCode(Enum):
    """Codes of Triton's C API, by the names it uses."""

    INVALID_ARG = "INVALID_ARG"
    """The request can never succeed as it is: mend it."""
    NOT_FOUND = "NOT_FOUND"
    """The session is unknown or has expired: open a new one."""
    UNAVAILABLE = "UNAVAILABLE"
    """The server is full: try again later."""
    CANCELLED = "CANCELLED"
    """The turn was cancelled; its session is back at its last completed turn."""
    INTERNAL = "INTERNAL"
    """Our fault; the session is back at its last completed turn."""


class SessionError(Exception):
    """A request that was refused or a turn that failed.

    `str(error)` is `CODE: sentence`. The code is part of the text because responses of a gRPC
    stream carry an error's text but not its code.
    """

    def __init__(self, code: ErrorCode, sentence: str) -> None:
        super().__init__(f"{code.name}: {sentence}")
        self.code = code
        self.sentence = sentence


def invalid(sentence: str) -> SessionError:
    """An INVALID_ARG error: say what was given, what was expected and what to do."""
    return SessionError(ErrorCode.INVALID_ARG, sentence)


def not_found(sentence: str) -> SessionError:
    """A NOT_FOUND error, for unknown and expired sessions."""
    return SessionError(ErrorCode.NOT_FOUND, sentence)


def unavailable(sentence: str) -> SessionError:
    """An UNAVAILABLE error, for limits that pass by themselves."""
    return SessionError(ErrorCode.UNAVAILABLE, sentence)
