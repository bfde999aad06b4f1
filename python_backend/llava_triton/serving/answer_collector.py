"""Hands turns to the decoupled language_model and answers once: the last step of `llava`."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from llava_triton.contract import protocol
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.errors import SessionError, as_session_error, unavailable
from llava_triton.contract.operations import OF_ENDINGS, OF_TURNS
from llava_triton.serving.backend import Backend
from llava_triton.serving.whole_answers import Inbox, Outcome

log = logging.getLogger(__name__)

_PASSED_ON = (protocol.TENANT, *OF_ENDINGS, *OF_TURNS)
"""Parameters of a request that are language_model's to read."""


class AnswerCollector:
    """`answer_collector`: keeps the response senders of the turns that language_model answers.

    `execute`'s thread makes all BLS calls. Each ends as soon as language_model has taken the turn,
    and brings no tensors; see `llava_triton.serving.whole_answers`.
    """

    def __init__(self, pb_utils: Any) -> None:
        self._backend = Backend(pb_utils)
        self._senders: dict[str, Any] = {}
        """By the numbers under which language_model will send the answers."""

    def initialize(self, args: dict[str, str]) -> None:
        """Nobody waits yet."""
        self._inbox = Inbox(self._answer)

    def execute(self, requests: list[Any]) -> None:
        """Pass every turn on."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                parameters = self._backend.parameters(request)
                if protocol.MARK in parameters:
                    sender.send(self._backend.response({}), flags=self._backend.final)
                else:
                    self._hand_over(request, parameters, sender)
            except Exception as error:
                self._backend.refuse(sender, as_session_error(error))

    def finalize(self) -> None:
        """Tell those who still wait."""
        self._inbox.close()
        for number in list(self._senders):
            self._answer(number, unavailable("the server is shutting down"))

    def _hand_over(self, request: Any, parameters: dict[str, Any], sender: Any) -> None:
        number = uuid.uuid4().hex
        passed_on = {name: parameters[name] for name in _PASSED_ON if name in parameters}
        self._senders[number] = sender
        try:
            self._backend.tell(
                "language_model",
                {protocol.WHOLE_ANSWER: self._inbox.token(number), **passed_on},
                inputs=request.inputs(),
                request_id=request.request_id(),
                correlation_id=request.correlation_id(),
                flags=request.flags(),
            )
        except Exception as error:  # such as a session that Triton does not know
            self._answer(number, as_session_error(error))

    def _answer(self, number: str, outcome: Outcome) -> None:
        sender = self._senders.pop(number, None)
        if sender is None:
            log.warning("an answer came that nobody waits for")
            return
        try:
            if isinstance(outcome, SessionError):
                self._backend.refuse(sender, outcome)
            else:
                response = self._backend.response(ANSWER.to_arrays(outcome))
                sender.send(response, flags=self._backend.final)
        except Exception:  # Triton has let go of it
            log.exception("an answer could not be sent")
