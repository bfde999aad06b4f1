"""Products with the weights on a GPU: torch's own, and those of 8-bit weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from llava_triton.kernels.gpu.attention import int8_product
from llava_triton.kernels.int8 import Int8Weight


class GpuLinear:
    """Implements `Linear`. Rounded weights become floats within the kernel, never in memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None, int8: bool) -> None:
        self._bias = bias
        self._weight = Int8Weight.of(weight) if int8 else weight

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        weight = self._weight
        if isinstance(weight, Int8Weight):
            return int8_product(x, weight.integers, weight.scales, self._bias)
        return functional.linear(x, weight, self._bias)
