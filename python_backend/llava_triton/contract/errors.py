"""The errors a client can get.

One class with a code and a subject, because what a caller does about an error depends on these
alone; the sentence is for the person who reads it.
"""

from __future__ import annotations

import logging
import re
from enum import Enum

from llava_triton.contract.models import INPUTS

log = logging.getLogger(__name__)


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


SESSION = "session"
"""Subject: the session is unknown or has expired."""
SHARED_MEMORY = "shared memory"
"""Subject: what passes between the models has no room at this moment."""
MODEL_PROCESS = "model process"
"""Subject: a model's process is dead or does not move."""
MODEL = "model"
"""Subject: a model is not loaded."""
CONNECTION = "connection"
"""Subject: there is no way to the server."""

_REGION = re.compile(r"/?llava-triton-server-[\w-]+")
"""Names by which the server's files can be found (`server_guard`), as Triton's errors tell them."""


class SessionError(Exception):
    """A request that was refused or a turn that failed.

    `str(error)` is `CODE: sentence`. The code is part of the text because responses of a gRPC
    stream carry an error's text but not its code. No sentence names the server's files: who knows
    the name of a model's shared memory can use it.

    Args:
        code: what a caller can do.
        sentence: what was given, what was expected and what to do.
        subject: what is wrong: the name of an input or one of this module's constants; empty where
            nobody needs to tell it from others.
    """

    def __init__(self, code: ErrorCode, sentence: str, subject: str = "") -> None:
        sentence = _REGION.sub("(one of the server's)", sentence)
        super().__init__(f"{code.name}: {sentence}")
        self.code = code
        self.sentence = sentence
        self.subject = subject


_CODE_IN_TEXT = re.compile(rf"\b({'|'.join(ErrorCode.__members__)}): ")


_FIRST_WORDS = re.compile(rf"({'|'.join(spec.name for spec in INPUTS)}|sampling parameter)\b")
_TRITONS = (
    ("Stub process", MODEL_PROCESS),
    ("Failed to obtain the health mutex", MODEL_PROCESS),
    ("StatusCode.UNAVAILABLE]", CONNECTION),
    ("shared memory", SHARED_MEMORY),
    ("not ready", MODEL),
    ("no available versions", MODEL),
)
"""What Triton, its Python backend and its gRPC client say, and what it is about."""


def error_from_text(text: str) -> SessionError:
    """What an error's text says: ours, which Triton wraps, or one of Triton's own.

    Over Triton's protocols an error is one text. Here, and nowhere else, code and subject are read
    from it.

    Triton's sequence batcher refuses requests of sequences that it does not know before any model
    sees them; it does so also for sessions that were idle for too long.
    """
    ours = _CODE_IN_TEXT.search(text)
    if ours:
        code, sentence = ErrorCode[ours.group(1)], text[ours.end() :]
        return SessionError(code, sentence, _subject(code, sentence))
    if "must specify the START flag" in text:
        return not_found(
            "the session is unknown or has expired; open a new one by a request with the "
            "sequence start flag"
        )
    if "non-zero or non-empty correlation ID" in text:
        return invalid(
            "the request names no session; give it a sequence ID, and the sequence start flag if "
            "it is the session's first"
        )
    return SessionError(ErrorCode.INTERNAL, text, _subject(ErrorCode.INTERNAL, text))


def _subject(code: ErrorCode, sentence: str) -> str:
    if code is ErrorCode.NOT_FOUND:
        return SESSION
    if code is ErrorCode.INTERNAL:
        return next((subject for words, subject in _TRITONS if words in sentence), "")
    named = _FIRST_WORDS.match(sentence) if code is ErrorCode.INVALID_ARG else None
    return named[1].replace(" parameter", "_parameters") if named else ""


def invalid(sentence: str, subject: str = "") -> SessionError:
    """An INVALID_ARG error: say what was given, what was expected and what to do."""
    return SessionError(ErrorCode.INVALID_ARG, sentence, subject)


def not_found(sentence: str) -> SessionError:
    """A NOT_FOUND error, for unknown and expired sessions."""
    return SessionError(ErrorCode.NOT_FOUND, sentence, SESSION)


def gone_elsewhere(session_id: int | str) -> SessionError:
    """UNAVAILABLE: another server has gone on with a session, by the journal of both. This server
    has closed it; the next turn is answered as that of an unknown session, which may be resumed."""
    return unavailable(
        f"session {session_id!r} goes on on another server, whose turns came first; what was said "
        "here since was not kept: ask again to go on there"
    )


def unavailable(sentence: str) -> SessionError:
    """An UNAVAILABLE error, for limits that pass by themselves."""
    return SessionError(ErrorCode.UNAVAILABLE, sentence)


def as_session_error(error: Exception) -> SessionError:
    """What a client is told of a failure; what it cannot act on goes to the log in full."""
    if isinstance(error, SessionError):
        return error
    # By name: clients import this module, and need no torch.
    if type(error).__name__ == "OutOfMemoryError":
        return unavailable("the device is out of memory; try again later")
    log.error("a turn failed", exc_info=error)
    return SessionError(ErrorCode.INTERNAL, f"the turn failed: {error!r}")
