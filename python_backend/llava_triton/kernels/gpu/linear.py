"""Products with the weights on a GPU: torch's own, and those of 8-bit and 4-bit weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llava_triton.kernels.gpu.attention import int8_product
from llava_triton.kernels.gpu.row_kernels import int4_product as int4_kernel
from llava_triton.kernels.int4 import Int4Weight, in_groups
from llava_triton.kernels.int8 import Int8Weight


class GpuLinear:
    """Implements `Linear`. Rounded weights become floats within the kernel, never in memory."""

    def __init__(self, weight: Tensor | Int8Weight | Int4Weight, bias: Tensor | None) -> None:
        self._bias = bias
        self._weight = PackedInt4.of(weight) if isinstance(weight, Int4Weight) else weight

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        weight = self._weight
        if isinstance(weight, PackedInt4):
            return int4_product(x, weight, self._bias)
        if isinstance(weight, Int8Weight):
            return int8_product(x, weight.integers, weight.scales, self._bias)
        return functional.linear(x, weight, self._bias)


@dataclass(frozen=True, eq=False)
class PackedInt4:
    """4-bit weights in the order of the kernel."""

    bytes: Tensor
    """uint8 [outputs, groups, group / 2]: the first half of a group in the low four bits, the other
    half in the high ones, so that a product takes either as it lies."""
    scales: Tensor
    """float32 [groups, outputs]"""
    zeros: Tensor
    """uint8 [groups, outputs]"""

    @classmethod
    def of(cls, weight: Int4Weight) -> PackedInt4:
        """Pack a matrix."""
        first, second = in_groups(weight.integers, weight.group).chunk(2, dim=2)
        scales, zeros = (each.T.contiguous() for each in (weight.scales, weight.zeros))
        return cls(first | second << 4, scales, zeros)


@dataclass(frozen=True)
class Int4Tile:
    """How `int4_product` cuts its work: rows and outputs of a program, which takes a group of
    inputs at a time."""

    rows: int
    outputs: int
    stages: int = 4

    @staticmethod
    def of(rows: int, dtype: torch.dtype) -> Int4Tile:
        """For so many rows; see `Int8Tile.of`."""
        if dtype == torch.float32:
            return Int4Tile(16, 16) if rows <= 16 else Int4Tile(32, 32)
        if rows <= 32:
            return Int4Tile(16 if rows <= 16 else 32, 16)
        return Int4Tile(64, 16 if rows <= 64 else 64, stages=3)


def int4_product(x: Tensor, weight: PackedInt4, bias: Tensor | None) -> Tensor:
    """x W^T + b, which reads about a quarter of what W in a half type would be.

    Args:
        x: float32, float16 or bfloat16 [T, inputs], contiguous.
        weight: W.
        bias: [outputs].

    Returns:
        [T, outputs], summed in float32.
    """
    rows, inputs = x.shape
    outputs, groups, half = weight.bytes.shape
    assert groups == -(-inputs // (2 * half))
    assert all(each.is_contiguous() for each in (x, weight.bytes, weight.scales, weight.zeros))
    out = x.new_empty((rows, outputs))
    tile = Int4Tile.of(rows, x.dtype)
    with torch.cuda.device_of(x):
        # Programs side by side share their weights, so that all but one find them in the cache.
        int4_kernel[(-(-rows // tile.rows), -(-outputs // tile.outputs))](
            x,
            weight.bytes,
            weight.scales,
            weight.zeros,
            weight.scales if bias is None else bias,
            out,
            rows,
            BIAS=bias is not None,
            INPUTS=inputs,
            OUTPUTS=outputs,
            GROUPS=groups,
            HALF=half,
            M=tile.rows,
            N=tile.outputs,
            num_warps=4,
            num_stages=tile.stages,
        )
    return out
