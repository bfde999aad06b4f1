"""Triton's Python backend, as far as our models use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_triton.contract.errors import SessionError, error_from_text
from llava_triton.contract.tensors import TensorSpec


class Backend:
    """What every model needs of Triton.

    Args:
        pb_utils: `triton_python_backend_utils`, or what stands for it.
    """

    def __init__(self, pb_utils: Any) -> None:
        self.pb_utils = pb_utils
        self.final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        """Flag of a request's last response."""
        self.start = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
        self.end = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END

    def parameters(self, request: Any) -> dict[str, Any]:
        """A request's parameters."""
        parameters: dict[str, Any] = json.loads(request.parameters() or "{}")
        return parameters

    def array(self, request: Any, spec: TensorSpec) -> np.ndarray | None:
        """An input, None where the request has none of the name."""
        tensor = self.pb_utils.get_input_tensor_by_name(request, spec.name)
        return None if tensor is None else tensor.as_numpy()

    def response(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """A response of these outputs."""
        tensors = [self.pb_utils.Tensor(name, array) for name, array in arrays.items()]
        return self.pb_utils.InferenceResponse(tensors)

    def refusal(self, error: SessionError) -> Any:
        """A response that is an error: of its subject only what its sentence says travels on.

        It is returned or sent, never raised: raising fails every request of the call, and is said
        to leak shared memory.
        """
        kind = self.pb_utils.TritonError
        told = kind(str(error), getattr(kind, error.code.name))
        return self.pb_utils.InferenceResponse(error=told)

    def refuse(self, sender: Any, error: SessionError) -> None:
        """End a request with an error."""
        sender.send(self.refusal(error), flags=self.final)

    def tell(
        self,
        model: str,
        parameters: dict[str, Any],
        *,
        inputs: Sequence[Any] = (),
        decoupled: bool = True,
        **sequence: Any,
    ) -> None:
        """Call another model, for nothing but its error: no tensor comes back.

        Args:
            model: its name.
            parameters: of the request.
            inputs: Triton's tensors.
            decoupled: whether the model is.
            sequence: `correlation_id`, `flags` and `request_id`.

        Raises:
            SessionError: what the model answers, or Triton in its place.
        """
        call = self.pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[],
            inputs=list(inputs),
            parameters=parameters,
            **sequence,
        )
        responses = call.exec(decoupled=True) if decoupled else [call.exec()]
        errors = [each.error().message() for each in responses if each.has_error()]
        if errors:
            raise error_from_text(errors[0])
