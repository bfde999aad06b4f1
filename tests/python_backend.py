"""Stands for `triton_python_backend_utils`, so that models run without Triton."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from llava_triton.contract.models import MODELS

WAIT_SECONDS = 60.0
EVERY_OUTPUT = MODELS["language_model"].outputs
"""Of a request to it that names none."""


class Tensor:
    """A tensor on the host."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.tensor_name = name
        self._array = array

    @staticmethod
    def from_dlpack(name: str, tensor: torch.Tensor) -> Tensor:
        return Tensor(name, tensor.numpy())

    def as_numpy(self) -> np.ndarray:
        return self._array

    def to_dlpack(self) -> Any:
        return torch.from_numpy(self._array.copy())  # it is as good as a capsule


class TritonError:
    """An error with a code."""

    INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED, INTERNAL = range(5)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    """Tensors or an error."""

    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self.tensors = {each.tensor_name: each for each in output_tensors}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def value(self, name: str) -> Any:
        """The first element of an output."""
        return self.tensors[name].as_numpy()[0]


class Sender:
    """Gathers what is sent."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.cancelled = False
        self._ended = threading.Event()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self._ended.is_set(), "a response behind the last one"
        if response is not None:
            self.responses.append(response)
        if flags:
            self._ended.set()

    def is_cancelled(self) -> bool:
        assert not self._ended.is_set(), "nobody knows any more"
        return self.cancelled

    def wait(self) -> list[InferenceResponse]:
        """All responses, once the last one has been sent."""
        assert self._ended.wait(WAIT_SECONDS)
        return self.responses


class Request:
    """A request to the model under test."""

    def __init__(
        self,
        arrays: dict[str, np.ndarray] | None = None,
        *,
        session: int | str = 0,
        flags: int = 0,
        parameters: dict[str, Any] | None = None,
        cancelled: bool = False,
        request_id: str = "",
        outputs: Sequence[str] | None = None,
    ) -> None:
        self.tensors = {name: Tensor(name, array) for name, array in (arrays or {}).items()}
        self.sender = Sender()
        self._session, self._flags, self._cancelled = session, flags, cancelled
        self._parameters = json.dumps(parameters or {})
        self._request_id = request_id
        self._outputs = [spec.name for spec in EVERY_OUTPUT] if outputs is None else list(outputs)

    def inputs(self) -> list[Tensor]:
        return list(self.tensors.values())

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def request_id(self) -> str:
        return self._request_id

    def correlation_id(self) -> int | str:
        return self._session

    def flags(self) -> int:
        return self._flags

    def parameters(self) -> str:
        return self._parameters

    def is_cancelled(self) -> bool:
        return self._cancelled

    def get_response_sender(self) -> Sender:
        return self.sender


class _Metric:
    def increment(self, value: float) -> None:
        pass

    def set(self, value: float) -> None:
        pass


class _MetricFamily:
    COUNTER, GAUGE = range(2)

    def __init__(self, **_: Any) -> None:
        pass

    def Metric(self, **_: Any) -> _Metric:  # noqa: N802
        return _Metric()


class _Logger:
    @staticmethod
    def log_info(text: str) -> None:
        pass


Model = Callable[[Any], list[InferenceResponse]]
"""Answers a call."""


class PythonBackend:
    """The module, in front of models that a test gives.

    Args:
        **models: by name.
    """

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
    TRITONSERVER_MEMORY_CPU = 0
    TRITONSERVER_MEMORY_GPU = 1
    MetricFamily, Logger = _MetricFamily, _Logger
    deserialize_bytes_tensor = None

    def __init__(self, **models: Model) -> None:
        self.calls: list[Any] = []
        """Requests to other models, in order."""
        self.Tensor, self.TritonError = Tensor, TritonError
        self.InferenceResponse = InferenceResponse
        backend = self

        class InferenceRequest:
            """A call of another model."""

            def __init__(self, **arguments: Any) -> None:
                vars(self).update(arguments)

            def exec(self, decoupled: bool = False) -> Any:
                backend.calls.append(self)
                model = models.get(vars(self)["model_name"], lambda _: [])
                responses = model(self)
                return iter(responses) if decoupled else responses[0]

        self.InferenceRequest = InferenceRequest

    @staticmethod
    def PreferredMemory(kind: int) -> int:  # noqa: N802
        return kind

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
        return request.tensors.get(name)

    @staticmethod
    def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
        return response.tensors.get(name)


def refusing(text: str) -> Model:
    """A model that answers every call with an error."""
    return lambda _: [InferenceResponse(error=TritonError(text))]
