"""BYTES tensors are read no further than they may be long."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from llava_triton.serving.bytes_tensors import limit_elements


def encoded(*elements: bytes) -> np.ndarray:
    data = b"".join(struct.pack("<I", len(each)) + each for each in elements)
    return np.frombuffer(data, dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 1_000_000])
def test_up_to_a_limit_tensors_are_read(count: int) -> None:
    read: list[int] = []

    def deserialize(data: np.ndarray) -> np.ndarray:
        read.append(len(data))
        return np.array([b"ab"] * count, dtype=np.object_)

    backend = SimpleNamespace(deserialize_bytes_tensor=deserialize)
    limit_elements(backend, most=9)
    elements = backend.deserialize_bytes_tensor(encoded(*[b"ab"] * count)).reshape([count])
    assert elements.shape == (count,)
    assert len(read) == (count <= 9)


@pytest.mark.parametrize("data", [b"\x05\0\0", b"\xff\xff\xff\xffab", b"\x01\0\0\0"])
def test_what_is_cut_off_is_the_backends_to_judge(data: bytes) -> None:
    backend = SimpleNamespace(deserialize_bytes_tensor=lambda encoded: "judged")
    limit_elements(backend, most=9)
    assert backend.deserialize_bytes_tensor(np.frombuffer(data, dtype=np.uint8)) == "judged"
