"""One tensor of Triton's: its name, type and shape, and its elements as plain values."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

Datatype = Literal["BYTES", "BOOL", "UINT8", "INT32", "FP32"]
"""As Triton's protocols spell it."""
_NUMBERS = {"INT32": struct.Struct("<i"), "FP32": struct.Struct("<f")}
"""Of answers."""
_DTYPES = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor. What answers consist of (BYTES, INT32, FP32) has a plain value, too: a str, an int
    or a float where the shape is [1], else a tuple of them."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...] = (1,)
    """-1: any number. Without the batch's dimension where a model has batches."""
    optional: bool = False
    """Where it is an input: whether a request may leave it out."""

    @cached_property
    def is_list(self) -> bool:
        """Whether its value is a tuple."""
        return self.shape != (1,)

    # Single values have a short way: every piece of every answer passes through here twice.

    def elements(self, value: Any) -> list[Any]:
        """The elements that a plain value consists of."""
        return list(value) if self.is_list else [value]

    def value(self, elements: Sequence[Any]) -> Any:
        """The plain value that consists of these elements."""
        return tuple(elements) if self.is_list else elements[0]

    def to_array(self, value: Any) -> np.ndarray:
        """A plain value as an array of the tensor's type, of one dimension."""
        if self.datatype == "BYTES":
            value = [each.encode() for each in value] if self.is_list else value.encode()
        return np.array(value if self.is_list else [value], dtype=_DTYPES[self.datatype])

    def from_array(self, array: np.ndarray) -> Any:
        """The plain value of an array."""
        elements = array.reshape(-1).tolist()
        if self.datatype == "BYTES":
            elements = [element.decode() for element in elements]
        return self.value(elements)

    def to_raw(self, value: Any) -> bytes:
        """A plain value as Triton's protocols carry it: little-endian, strings behind lengths."""
        elements = self.elements(value)
        if self.datatype == "BYTES":
            strings = [element.encode() for element in elements]
            return b"".join(_LENGTH.pack(len(string)) + string for string in strings)
        return b"".join(map(_NUMBERS[self.datatype].pack, elements))

    def from_raw(self, raw: bytes) -> Any:
        """The plain value of what Triton's protocols carry."""
        if not self.is_list:
            if self.datatype == "BYTES":
                return raw[_LENGTH.size :].decode()
            return _NUMBERS[self.datatype].unpack(raw)[0]
        if self.datatype == "BYTES":
            return self.value(_strings(raw))
        return self.value([number for (number,) in _NUMBERS[self.datatype].iter_unpack(raw)])


def _strings(raw: bytes) -> list[str]:
    strings, position = [], 0
    while position < len(raw):
        begin = position + _LENGTH.size
        position = begin + _LENGTH.unpack_from(raw, position)[0]
        strings.append(raw[begin:position].decode())
    return strings
