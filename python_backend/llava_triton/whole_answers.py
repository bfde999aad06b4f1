"""How a whole answer gets from language_model's process to answer_collector's, which waits for it.

language_model streams, and an ensemble with a model that streams is itself one that streams: so
`llava`, which answers once, reaches it by a BLS call of answer_collector. That call hands the turn
over and ends at once, empty. When the turn has ended, language_model calls answer_collector with
the answer in the request's parameters.

No tensor comes back from a decoupled BLS call, because freeing such tensors corrupts the process
that made the call (`benchmarks/decoupled_bls.py` shows it). And a turn that waits occupies neither
a thread here nor one of the 32 places that Triton's Python backend has for a model's calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from llava_triton.delta import Delta
from llava_triton.errors import SessionError, error_from_text

DELIVERED_TO = "delivered_to"
"""Request parameter of a call that brings an answer: the token under which it is waited for."""
_ANSWER, _ERROR = "answer", "error"

Outcome = Delta | SessionError
"""A whole answer, or why there is none."""


class WholeAnswer:
    """A turn's listener that gathers the pieces and tells its outcome once.

    Args:
        tell: is called with the outcome, on the engine's thread.
    """

    def __init__(self, tell: Callable[[Outcome], None]) -> None:
        self._tell = tell
        self._pieces: list[str] = []

    def __call__(self, event: Delta | SessionError) -> None:
        """Take the turn's next event."""
        if isinstance(event, SessionError):
            self._tell(event)
            return
        self._pieces.append(event.text)
        if event.is_final:
            self._tell(event.with_text("".join(self._pieces)))


def to_parameters(token: str, outcome: Outcome) -> dict[str, str]:
    """Parameters of the call that brings an outcome to who waits under `token`."""
    if isinstance(outcome, SessionError):
        return {DELIVERED_TO: token, _ERROR: str(outcome)}
    # JSON in ASCII: a parameter is a C string, which ends at the first zero.
    return {DELIVERED_TO: token, _ANSWER: json.dumps(asdict(outcome))}


def from_parameters(parameters: Mapping[str, Any]) -> Outcome:
    """The outcome that `to_parameters` wrote.

    Raises:
        Exception: somebody else wrote them.
    """
    if _ERROR in parameters:
        return error_from_text(parameters[_ERROR])
    return Delta(**json.loads(parameters[_ANSWER]))
