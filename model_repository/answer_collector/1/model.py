"""Hands turns to the decoupled language_model and answers once: the last step of `llava`."""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from llava_triton import protocol
from llava_triton.errors import SessionError, as_session_error, error_from_text, unavailable
from llava_triton.whole_answers import Inbox, Outcome

log = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """`answer_collector`: keeps the response senders of the turns that language_model answers.

    `execute`'s thread makes all BLS calls. Each ends as soon as language_model has taken the turn,
    and brings no tensors; see `llava_triton.whole_answers`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Nobody waits yet."""
        self._senders: dict[str, Any] = {}
        """By the numbers under which language_model will send the answers."""
        self._inbox = Inbox(self._answer)

    def execute(self, requests: list[Any]) -> None:
        """Pass every turn on."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                parameters = json.loads(request.parameters() or "{}")
                if protocol.MARK in parameters:
                    sender.send(pb_utils.InferenceResponse([]), flags=FINAL)
                else:
                    self._hand_over(request, parameters, sender)
            except Exception as error:
                _send(sender, as_session_error(error))

    def finalize(self) -> None:
        """Tell those who still wait."""
        self._inbox.close()
        for number in list(self._senders):
            self._answer(number, unavailable("the server is shutting down"))

    def _hand_over(self, request: Any, parameters: dict[str, Any], sender: Any) -> None:
        number = uuid.uuid4().hex
        tenant = parameters.get(protocol.TENANT)
        call = pb_utils.InferenceRequest(
            model_name="language_model",
            requested_output_names=[],
            inputs=request.inputs(),
            correlation_id=request.correlation_id(),
            flags=request.flags(),
            parameters={protocol.WHOLE_ANSWER: self._inbox.token(number)}
            | ({} if tenant is None else {protocol.TENANT: tenant}),
        )
        self._senders[number] = sender
        try:
            for response in call.exec(decoupled=True):
                if response.has_error():  # such as a session that Triton does not know
                    self._answer(number, error_from_text(response.error().message()))
        except Exception as error:
            self._answer(number, as_session_error(error))

    def _answer(self, number: str, outcome: Outcome) -> None:
        sender = self._senders.pop(number, None)
        if sender is None:
            log.warning("an answer came that nobody waits for")
            return
        try:
            _send(sender, outcome)
        except Exception:  # Triton has let go of it
            log.exception("an answer could not be sent")


def _send(sender: Any, outcome: Outcome) -> None:
    if isinstance(outcome, SessionError):
        code = getattr(pb_utils.TritonError, outcome.code.name)
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(outcome), code))
    else:
        arrays: dict[str, np.ndarray] = protocol.output_arrays(outcome)
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        response = pb_utils.InferenceResponse(tensors)
    sender.send(response, flags=FINAL)
