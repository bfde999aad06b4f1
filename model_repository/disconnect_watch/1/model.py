"""Stops the turn of a client that has gone: the last step of `llava_stream`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton_python_backend_utils as pb_utils

from llava_triton import protocol

START_AND_END = (
    pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
    | pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
)


class TritonPythonModel:
    """`disconnect_watch`: runs once per streamed response and answers with nothing."""

    def initialize(self, args: dict[str, str]) -> None:
        """Calls to language_model wait in a thread of their own."""
        self._calls = ThreadPoolExecutor(max_workers=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Cancel the turns whose clients are gone."""
        for request in requests:
            turn_id = pb_utils.get_input_tensor_by_name(request, protocol.TURN_ID).as_numpy()[0]
            if turn_id and request.is_cancelled():
                self._calls.submit(_cancel, turn_id.decode())
        return [pb_utils.InferenceResponse([]) for _ in requests]

    def finalize(self) -> None:
        """Let running calls end."""
        self._calls.shutdown()


def _cancel(turn_id: str) -> None:
    # A sequence of its own, of one request: Triton delivers it beside the turn it stops.
    call = pb_utils.InferenceRequest(
        model_name="language_model",
        requested_output_names=[],
        inputs=[],
        correlation_id=turn_id,
        flags=START_AND_END,
        parameters={protocol.CANCEL_TURN: turn_id},
    )
    for response in call.exec(decoupled=True):
        if response.has_error():
            pb_utils.Logger.log_warn(f"turn {turn_id} was not stopped: {response.error()}")
