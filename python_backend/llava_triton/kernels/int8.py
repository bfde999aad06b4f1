"""Weights as 8-bit integers: half of what a decode step reads in a half type, a quarter of float32.

Each row of a matrix (one output) has a scale of its own, so that its largest weight is 127. Inputs
and sums stay what they were; the embedding and the last matrix, whose rounding shows most, are left
as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A matrix W, rounded."""

    integers: Tensor
    """int8 [outputs, inputs], contiguous."""
    scales: Tensor
    """float32 [outputs]: W is about `integers * scales[:, None]`."""
    dtype: torch.dtype
    """Of the tokens that are multiplied with it."""

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Round a matrix [outputs, inputs] of any float type."""
        exact = weight.float()
        scales = (exact.abs().amax(dim=1) / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
        integers = (exact / scales[:, None]).round_().to(torch.int8)
        return cls(integers, scales, weight.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The rounded matrix as floats, [outputs, inputs]."""
        return (self.integers * self.scales[:, None]).to(dtype)
