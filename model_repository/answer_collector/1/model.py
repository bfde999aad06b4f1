"""Calls the decoupled language_model and answers once: the last step of `llava`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from llava_triton import protocol
from llava_triton.errors import error_from_text
from llava_triton.settings import Settings

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """`answer_collector`: a thread per turn waits for its answer."""

    def initialize(self, args: dict[str, str]) -> None:
        """Make room for as many waiting turns as the engine takes, and one to hear its refusal."""
        settings = Settings.of_repository(Path(args["model_repository"]).parent)
        self._waiting = ThreadPoolExecutor(max_workers=settings.max_queued_turns + 1)

    def execute(self, requests: list[Any]) -> None:
        """Pass every request on; its answer follows through its response sender."""
        for request in requests:
            told = json.loads(request.parameters() or "{}")
            tenant = {name: told[name] for name in (protocol.TENANT,) if name in told}
            call = pb_utils.InferenceRequest(
                model_name="language_model",
                requested_output_names=list(protocol.ANSWER_OUTPUTS),
                inputs=request.inputs(),
                correlation_id=request.correlation_id(),
                flags=request.flags(),
                parameters={protocol.WHOLE_ANSWER: True, **tenant},
            )
            self._waiting.submit(_answer, call, request.get_response_sender())

    def finalize(self) -> None:
        """Let waiting turns finish."""
        self._waiting.shutdown()


def _answer(call: Any, sender: Any) -> None:
    try:
        outputs: list[Any] = []
        error = None
        for response in call.exec(decoupled=True):
            if response.has_error():
                error = _with_code(response.error())
            else:
                outputs = response.output_tensors() or outputs
        response = pb_utils.InferenceResponse(outputs, error=error)
    except Exception as failure:
        error = pb_utils.TritonError(f"INTERNAL: {failure}", pb_utils.TritonError.INTERNAL)
        response = pb_utils.InferenceResponse(error=error)
    sender.send(response, flags=FINAL)


def _with_code(error: Any) -> Any:
    """Triton drops an error's code where one model calls another; its text still tells."""
    told = error_from_text(error.message())
    return pb_utils.TritonError(str(told), getattr(pb_utils.TritonError, told.code.name))
