"""What a request can ask of a session besides its next turn: to go back, to fork, to be brought
back, to end an answer.

Operations are request parameters, which Triton's ensembles hand on to every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_triton.contract.errors import invalid

REWIND = "rewind"
"""Request parameter, see `Operation.rewind`."""
REGENERATE = "regenerate"
"""Request parameter, see `Operation.regenerate`."""
FORK = "fork"
"""Request parameter, see `Operation.fork`."""
RESUME = "resume"
"""Request parameter, see `Operation.resume`."""
STOP_ANSWER = "stop_answer"
"""Request parameter: the ID of a session whose answer in flight ends now, as a completed turn. It
is a request of its own, with START, END and a sequence ID of its own, and nothing else in it: a
turn of the session would wait for that answer."""
CANCEL_ANSWER = "cancel_answer"
"""Request parameter, of a request like that of `STOP_ANSWER`: the ID of a session, one of whose
turns is undone, as if its client had gone. `CANCEL_REQUEST` says which."""
CANCEL_REQUEST = "cancel_request"
"""Request parameter beside `CANCEL_ANSWER`: the request ID of the turn."""
OF_ENDINGS = (STOP_ANSWER, CANCEL_ANSWER, CANCEL_REQUEST)
"""Those that an `Ending` is made of."""
OF_TURNS = (REWIND, REGENERATE, FORK, RESUME)
"""Those that change what a turn does."""
MAX_ID_CHARACTERS = 128
"""Of a session's ID, as in Triton."""
_MAX_INT = 2**63 - 1
"""What a request parameter can hold."""
_MOST_TURNS = 2**31 - 1
"""More than a session can have."""


@dataclass(frozen=True)
class Operation:
    """What a request does to its session before its own message is taken."""

    rewind: int | None = None
    """Keep so many completed turns, and forget the others."""
    regenerate: bool = False
    """Forget the last answer, and answer its question again; the request has no message. With
    `fork` the answer may be one that its source is giving."""
    fork: int | str | None = None
    """Open the session as a copy of the open one of this ID, up to its last completed turn, or up
    to `rewind`. The request has START and no message. With `regenerate`, the last question is
    answered once more, here: another answer to it, of which its source knows nothing."""
    resume: bool = False
    """Open the session as the journal has it, and go on as in a later turn: whatever such a turn
    may have, this one may. Where the session is open, it goes on as it is. Where it is neither open
    nor in the journal, or the server keeps none, the error is that of a later turn of an unknown
    session: NOT_FOUND. The request has START, because Triton's batcher does not know the session
    either."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Operation:
        """Read a request's parameters; others than `OF_TURNS` are not looked at.

        Raises:
            SessionError: INVALID_ARG, a value has the wrong type or range.
        """
        given = {name: parameters[name] for name in OF_TURNS if name in parameters}
        turns = given.get(REWIND, 0)
        if not _is_int(turns) or not 0 <= turns <= _MOST_TURNS:
            raise invalid(
                f"the parameter {REWIND} is {_shown(turns)}; it must be the number of turns to "
                f"keep, a whole number from 0 to {_MOST_TURNS}"
            )
        again = given.get(REGENERATE, False)
        if not isinstance(again, bool):
            raise invalid(
                f"the parameter {REGENERATE} is {_shown(again)}; it must be true or false"
            )
        if not isinstance(given.get(RESUME, False), bool):
            raise invalid(
                f"the parameter {RESUME} is {_shown(given[RESUME])}; it must be true or false"
            )
        if FORK in given:
            check_session_id(FORK, given[FORK])
        return cls(**given)

    def to_parameters(self) -> dict[str, Any]:
        """The request parameters that say so."""
        values = {
            REWIND: self.rewind,
            REGENERATE: self.regenerate or None,
            FORK: self.fork,
            RESUME: self.resume or None,
        }
        return {name: value for name, value in values.items() if value is not None}


NO_OPERATION = Operation()


@dataclass(frozen=True)
class Ending:
    """What a request does to an answer that another request is given."""

    session_id: int | str
    """Whose answer."""
    cancelled: str | None = None
    """The request ID of the turn to undo; None: the running answer ends, and is kept."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Ending | None:
        """Read a request's parameters; None where it ends no answer.

        Raises:
            SessionError: INVALID_ARG, a value has the wrong type or range.
        """
        if STOP_ANSWER in parameters:
            return cls(check_session_id(STOP_ANSWER, parameters[STOP_ANSWER]))
        if CANCEL_ANSWER not in parameters:
            return None
        session_id = check_session_id(CANCEL_ANSWER, parameters[CANCEL_ANSWER])
        request_id = parameters.get(CANCEL_REQUEST, "")
        if not isinstance(request_id, str) or not request_id:
            raise invalid(
                f"the parameter {CANCEL_REQUEST} is {_shown(request_id)}; beside {CANCEL_ANSWER} "
                "it must be the request ID with which the turn was sent"
            )
        return cls(session_id, request_id)

    def to_parameters(self) -> dict[str, Any]:
        """The request parameters that say so."""
        if self.cancelled is None:
            return {STOP_ANSWER: self.session_id}
        return {CANCEL_ANSWER: self.session_id, CANCEL_REQUEST: self.cancelled}

    @property
    def name(self) -> str:
        """Of the parameter that asks for it."""
        return STOP_ANSWER if self.cancelled is None else CANCEL_ANSWER


def check_session_id(name: str, value: Any) -> int | str:
    """The session ID that a request parameter holds.

    Raises:
        SessionError: INVALID_ARG, it is none.
    """
    if isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS:
        return value
    if _is_int(value) and 0 < value <= _MAX_INT:
        return int(value)
    raise invalid(
        f"the parameter {name} is {_shown(value)}; it must be the ID of an open session, a string "
        f"of 1 to {MAX_ID_CHARACTERS} characters or an integer from 1 to {_MAX_INT}"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
