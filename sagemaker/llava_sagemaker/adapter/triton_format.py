"""Triton's own inference requests for `llava`: JSON, or JSON with binary tensors behind it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_sagemaker.adapter.invocation import (
    AnswerFormat,
    Body,
    Invocation,
    Request,
    as_json,
    in_session,
)
from llava_sagemaker.adapter.json_body import PIECE_BYTES, LongString
from llava_sagemaker.adapter.turns import Tensor, TritonTurn, packed, utf8
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.models import INPUTS
from llava_triton.contract.operations import REGENERATE, REWIND, Operation
from llava_triton.contract.tensors import TensorSpec

BINARY_CONTENT_TYPE = "application/vnd.sagemaker-triton.binary+json"
_HEADER_SIZE = "json-header-size"
_MOST_DIGITS = 20
_MOST_ELEMENTS = 256
"""Of an input: more than the models would take, whose own limit is told by them."""
_INPUTS = [spec.name for spec in INPUTS]
_OUTPUTS = {spec.name: spec for spec in ANSWER.outputs}


def json_size(request: Request) -> int:
    """Of a body with binary tensors: how many bytes the JSON has that it begins with.

    Raises:
        AdapterError: invalid_request.
    """
    given = request.content_parameters.get(_HEADER_SIZE, "")
    digits = given.isascii() and given.isdigit() and len(given) <= _MOST_DIGITS
    if not digits or int(given) > len(request.body):
        raise invalid_request(
            f"the content type's {_HEADER_SIZE} is {given[:80]!r}; it must be the length of the "
            f"JSON that the body begins with, at most {len(request.body)}"
        )
    return int(given)


def triton_request(request: Request, fields: dict[str, Any], size: int) -> Invocation:
    """An inference request.

    Args:
        request: its session header becomes the sequence ID, NEW_SESSION the start flag. The
            client's own `sequence_id` and `sequence_start` have no meaning here.
        fields: its JSON; the parameter `sequence_end` closes the session, `rewind` and
            `regenerate` go back in it.
        size: bytes of the JSON in the body; binary tensors may stand behind it.

    Raises:
        AdapterError: invalid_request, naming what cannot be followed.
    """
    parameters = _object(fields.get("parameters", {}), "parameters")
    end = parameters.get("sequence_end", False)
    if not isinstance(end, bool):
        raise invalid_request("the parameter sequence_end must be true or false")
    flags = request.session_flags(end)
    turn = TritonTurn(
        **flags,
        tensors=dict(_tensors(fields.get("inputs"), request.body, size)),
        parameters=Operation.from_parameters(
            {name: parameters[name] for name in (REWIND, REGENERATE) if name in parameters}
        ).to_parameters(),
    )
    answer = _InferenceResponse(
        _id(fields.get("id")),
        tuple(_requested(fields.get("outputs"), parameters.get("binary_data_output") is True)),
    )
    return in_session("triton", turn, answer, request.wants_events)


@dataclass(frozen=True)
class _InferenceResponse(AnswerFormat):
    """Triton's inference response."""

    request_id: str
    requested: tuple[tuple[TensorSpec, bool], ...]
    """Outputs, and whether they are to be binary."""

    def whole(self, answer: Delta) -> Body:
        values = ANSWER.to_values(answer)
        tensors: list[dict[str, Any]] = []
        binary: list[bytes] = []
        for spec, as_binary in self.requested:
            elements = spec.elements(values[spec.name])
            tensor: dict[str, Any] = {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": [len(elements)],
            }
            if as_binary:
                binary.append(spec.to_raw(values[spec.name]))
                tensor["parameters"] = {"binary_data_size": len(binary[-1])}
            else:
                tensor["data"] = elements
            tensors.append(tensor)
        request_id = {"id": self.request_id} if self.request_id else {}
        body = as_json(
            {**request_id, "model_name": "llava", "model_version": "1", "outputs": tensors}
        )
        if not binary:
            return body
        return Body(
            b"".join([body.content, *binary]),
            f"{BINARY_CONTENT_TYPE};{_HEADER_SIZE}={len(body.content)}",
        )


def _tensors(inputs: Any, body: bytes, offset: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(inputs, list):
        raise invalid_request("inputs must be a list of tensors")
    seen = set()
    for tensor in inputs:
        fields = _object(tensor, "each of inputs")
        name = fields.get("name")
        if name not in _INPUTS or name in seen:
            raise invalid_request(
                f"inputs has {str(name)[:80]!r}, unknown or twice; known are {', '.join(_INPUTS)}"
            )
        seen.add(name)
        if fields.get("datatype") != "BYTES":
            raise invalid_request(f"the input {name} must have the datatype BYTES")
        size = _object(fields.get("parameters", {}), "parameters").get("binary_data_size")
        if size is None:
            given = packed(list(_strings(name, fields.get("data"))))
        else:
            left = len(body) - offset
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= left:
                raise invalid_request(
                    f"the input {name} has the binary_data_size {str(size)[:80]}; "
                    f"{left} bytes are left"
                )
            end = offset + size
            count = _packed_elements(name, memoryview(body)[offset:end])
            # In pieces: see `off_loop`.
            starts = range(offset, end, PIECE_BYTES)
            given = Tensor(count, tuple(body[at : min(at + PIECE_BYTES, end)] for at in starts))
            offset = end
        if fields.get("shape") != [given.elements]:
            raise invalid_request(
                f"the input {name} has {given.elements} elements and the shape "
                f"{str(fields.get('shape'))[:80]}; the shape must be [{given.elements}]"
            )
        yield name, given
    if offset != len(body):
        raise invalid_request(f"the body goes on for {len(body) - offset} bytes after its inputs")


def _strings(name: str, data: Any) -> Iterator[bytes | LongString]:
    if not isinstance(data, list) or not all(isinstance(value, str | LongString) for value in data):
        raise invalid_request(f"the input {name} must have data, a flat list of strings")
    if len(data) > _MOST_ELEMENTS:
        raise _too_many(name)
    yield from (utf8(value) if isinstance(value, str) else value for value in data)


def _too_many(name: str) -> AdapterError:
    return invalid_request(
        f"the input {name} has more than {_MOST_ELEMENTS} elements; send pictures in several turns"
    )


def _packed_elements(name: str, data: memoryview) -> int:
    """How many elements there are, each behind its length."""
    count = position = 0
    while position < len(data):
        if count == _MOST_ELEMENTS:
            raise _too_many(name)
        end = position + 4
        if end <= len(data):
            end += struct.unpack_from("<I", data, position)[0]
        if end > len(data):
            raise invalid_request(
                f"the input {name} is cut off: its element {count + 1} ends {end - len(data)} "
                "bytes behind the tensor; each element is preceded by its length in 4 bytes"
            )
        position = end
        count += 1
    return count


def _requested(given: Any, binary_by_default: bool) -> Iterator[tuple[TensorSpec, bool]]:
    if given is None:
        yield from ((spec, binary_by_default) for spec in ANSWER.outputs)
        return
    if not isinstance(given, list):
        raise invalid_request("outputs must be a list")
    seen = set()
    for tensor in given:
        fields = _object(tensor, "each of outputs")
        name = fields.get("name")
        if not isinstance(name, str) or name not in _OUTPUTS or name in seen:
            raise invalid_request(
                f"outputs has {str(name)[:80]!r}, unknown or twice; known are {', '.join(_OUTPUTS)}"
            )
        seen.add(name)
        parameters = _object(fields.get("parameters", {}), "parameters")
        yield _OUTPUTS[name], parameters.get("binary_data", binary_by_default) is True


def _id(given: Any) -> str:
    if given is None:
        return ""
    if not isinstance(given, str):
        raise invalid_request("id must be a string")
    return given


def _object(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise invalid_request(f"{name} must be an object")
    return given
