"""BYTES tensors of Triton's Python backend, read no further than they may be long."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_LENGTH = struct.Struct("<I")


def limit_elements(pb_utils: Any, most: int) -> None:
    """Let this process read at most so many elements of a BYTES tensor.

    The backend makes Python objects of all elements before a model sees how many there are: five
    million empty ones, 20 MB, would keep every session waiting for seconds. A tensor of more has
    its shape, and empty elements.

    Args:
        pb_utils: `triton_python_backend_utils`, through which the backend reads.
        most: elements.
    """
    read = pb_utils.deserialize_bytes_tensor

    def limited(encoded: Any) -> Any:
        return _TooMany() if _has_more(memoryview(encoded).cast("B"), most) else read(encoded)

    pb_utils.deserialize_bytes_tensor = limited


class _TooMany:
    """In place of an array that is not read."""

    def reshape(self, shape: Any) -> np.ndarray[Any, Any]:
        """Empty elements of a shape, which take no memory."""
        return np.broadcast_to(np.array(b"", dtype=np.object_), tuple(shape))


def _has_more(encoded: memoryview, most: int) -> bool:
    """Whether there are more elements, each behind its length."""
    position = 0
    for _ in range(most):
        if position + _LENGTH.size > len(encoded):
            return False
        position += _LENGTH.size + _LENGTH.unpack_from(encoded, position)[0]
    return position < len(encoded)
