"""Products with the weights on a GPU: torch's own, and those of 8-bit weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from llava_triton.kernels.gpu.attention import INT8_ROWS, int8_product
from llava_triton.kernels.int8 import Int8Weight


class GpuLinear:
    """Implements `Linear`. Rounded weights become floats again for the tokens of a prompt."""

    def __init__(self, weight: Tensor, bias: Tensor | None, int8: bool) -> None:
        self._bias, self._dtype = bias, weight.dtype
        self._weight = Int8Weight.of(weight) if int8 else weight

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        weight = self._weight
        if isinstance(weight, Int8Weight):
            if len(x) <= INT8_ROWS:
                return int8_product(x, weight.integers, weight.scales, self._bias)
            weight = weight.dequantized(self._dtype)
        return functional.linear(x, weight, self._bias)
