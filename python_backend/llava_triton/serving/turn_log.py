"""One line of JSON in the log for each turn, where the setting `log_turns` is on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.engine.turn import Listener, TurnRequest

SESSION_DIGITS = 12
"""Digits of the ID's hash: enough to find a session's lines. The ID itself would open the session
to every reader."""


def session_hash(session_id: int | str) -> str:
    """What stands for a session in the log: the first hexadecimal digits of its ID's SHA-256."""
    return hashlib.sha256(str(session_id).encode()).hexdigest()[:SESSION_DIGITS]


def without_ids(text: str, *session_ids: int | str | None) -> str:
    """The text with other words for these IDs, also where they are quoted as Python does it."""
    named = {form(each) for each in session_ids if each for form in (repr, str)}
    for written in sorted(named, key=len, reverse=True):  # one may be a part of another
        text = text.replace(written, "(an ID)")
    return text


class LoggedTurn:
    """A listener that tells another one, and writes the line when the turn has ended.

    Args:
        listener: whom it tells.
        session_id: the turn's.
        request_id: what the client called its request; may be empty.
        write: takes the line.
    """

    def __init__(
        self,
        listener: Listener,
        session_id: int | str,
        request_id: str = "",
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._listener = listener
        self._write = write or _print
        self._session_ids: list[int | str | None] = [session_id]
        """Those that it names."""
        self._began = time.monotonic()
        self._line: dict[str, object] = {
            "event": "turn",
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "session": session_hash(session_id),
            "request": request_id,
        }
        self.turn_id = ""
        """The engine's, when it has taken the turn."""

    def asks(self, turn: TurnRequest) -> None:
        """What the turn is, when the request has been read."""
        self._session_ids.append(turn.operation.fork)
        self._line |= {
            "tenant": turn.tenant,
            "opens": turn.start,
            "closes": turn.end,
            "pictures": len(turn.image_features),
        }

    def __call__(self, event: Delta | SessionError) -> None:
        """An event of the turn; the last one ends it."""
        self._listener(event)
        total = round((time.monotonic() - self._began) * 1000.0, 1)
        line = {**self._line, "turn": self.turn_id, "total_ms": total}
        if isinstance(event, SessionError):
            sentence = without_ids(event.sentence, *self._session_ids)
            line |= {"outcome": event.code.name, "error": sentence}
        elif event.is_final:
            line |= {
                "outcome": event.finish_reason,
                "input_tokens": event.num_input_tokens,
                "cached_tokens": event.num_cached_tokens,
                "output_tokens": event.num_output_tokens,
                "first_token_ms": round(event.first_token_ms, 1),
            }
        else:
            return
        self._write(json.dumps(line))


def _print(line: str) -> None:
    print(line, flush=True)
