"""Hands turns to the decoupled language_model and answers once: the last step of `llava`."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from llava_triton import protocol
from llava_triton.errors import SessionError, as_session_error, error_from_text, unavailable
from llava_triton.whole_answers import DELIVERED_TO, Outcome, from_parameters

log = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """`answer_collector`: keeps the response senders of the turns that language_model answers.

    One thread makes all BLS calls, in the order the turns came. Each ends as soon as language_model
    has taken the turn, and brings no tensors; see `llava_triton.whole_answers`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Nobody waits yet."""
        self._senders: dict[str, Any] = {}
        """By the tokens under which language_model will bring the answers."""
        self._calls = ThreadPoolExecutor(1, "calls")

    def execute(self, requests: list[Any]) -> None:
        """Pass every turn on; take the answers that language_model brings."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                parameters = json.loads(request.parameters() or "{}")
                if DELIVERED_TO not in parameters and protocol.MARK not in parameters:
                    self._hand_over(request, parameters, sender)
                    continue
                if DELIVERED_TO in parameters:
                    self._answer(parameters[DELIVERED_TO], from_parameters(parameters))
                sender.send(pb_utils.InferenceResponse([]), flags=FINAL)
            except Exception as error:
                _send(sender, as_session_error(error))

    def finalize(self) -> None:
        """Tell those who still wait."""
        self._calls.shutdown()
        for token in list(self._senders):
            with contextlib.suppress(Exception):  # Triton may have let go of it
                self._answer(token, unavailable("the server is shutting down"))

    def _hand_over(self, request: Any, parameters: dict[str, Any], sender: Any) -> None:
        token = uuid.uuid4().hex
        tenant = parameters.get(protocol.TENANT)
        call = pb_utils.InferenceRequest(
            model_name="language_model",
            requested_output_names=[],
            inputs=request.inputs(),
            correlation_id=request.correlation_id(),
            flags=request.flags(),
            parameters={protocol.WHOLE_ANSWER: token}
            | ({} if tenant is None else {protocol.TENANT: tenant}),
        )
        self._senders[token] = sender
        self._calls.submit(self._call, token, call)

    def _call(self, token: str, call: Any) -> None:
        try:
            for response in call.exec(decoupled=True):
                if response.has_error():  # such as a session that Triton does not know
                    self._answer(token, error_from_text(response.error().message()))
        except Exception as error:
            self._answer(token, as_session_error(error))

    def _answer(self, token: str, outcome: Outcome) -> None:
        sender = self._senders.pop(token, None)
        if sender is None:
            log.warning("an answer came that nobody waits for")
        else:
            _send(sender, outcome)


def _send(sender: Any, outcome: Outcome) -> None:
    if isinstance(outcome, SessionError):
        code = getattr(pb_utils.TritonError, outcome.code.name)
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(outcome), code))
    else:
        arrays: dict[str, np.ndarray] = protocol.output_arrays(outcome)
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        response = pb_utils.InferenceResponse(tensors)
    sender.send(response, flags=FINAL)
