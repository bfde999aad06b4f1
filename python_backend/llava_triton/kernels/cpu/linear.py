"""Products with the weights on a CPU: `products.cpp`, bound."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llava_triton.kernels.cpu.attention import cpu_kernels
from llava_triton.kernels.int8 import Int8Weight

PANEL_OUTPUTS = 32
"""Rows of a matrix that lie side by side."""
INT8_ROWS = {torch.float32: 12, torch.bfloat16: 3}
"""Up to so many tokens are multiplied by integers, by the tokens' dtype: the memory decides then,
and they take a half or a quarter of its time. With more tokens the arithmetic decides, and that of
integers is slower."""


class CpuLinear:
    """Implements `Linear` for float32 and bfloat16, with sums in float32.

    A token's result is the same to the last bit whichever tokens are beside it. One case is
    different, 8-bit weights and tokens in bfloat16: with at most `INT8_ROWS` tokens the sums are
    added up in another order than with more.

    Rounded weights are kept twice: as integers, and as floats of the same values for many tokens.
    (Integers up to 127 are exact in both types.)
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, int8: bool) -> None:
        self.outputs, self.inputs = weight.shape
        self.bias = bias
        self.integers: Tensor | None = None
        self.scales: Tensor | None = None
        if int8:
            rounded = Int8Weight.of(weight)
            self.integers, self.scales = in_panels(rounded.integers), rounded.scales
            weight = rounded.integers.to(weight.dtype)
        self.weight = in_panels(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        assert x.dtype == self.weight.dtype
        assert x.is_contiguous()
        rows, inputs = x.shape
        assert inputs == self.inputs
        kernels = cpu_kernels(x.dtype)
        kernel, weight, scales = kernels.products, self.weight, self.scales
        if self.integers is not None and rows <= INT8_ROWS[x.dtype]:
            kernel, weight = kernels.int8_products, self.integers
        out = x.new_empty((rows, self.outputs))
        kernel(
            x.data_ptr(),
            weight.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
            rows,
            inputs,
            self.outputs,
            torch.get_num_threads(),
        )
        return out


def in_panels(weight: Tensor) -> Tensor:
    """A matrix as the kernels read it.

    Args:
        weight: float32, bfloat16 or int8 [outputs, inputs].

    Returns:
        [panels, steps, PANEL_OUTPUTS, inputs of a step], filled up with zeros. A step is what one
        instruction multiplies: a pair of inputs in bfloat16, one input else.
    """
    step = 2 if weight.dtype == torch.bfloat16 else 1
    outputs, inputs = weight.shape
    full = functional.pad(weight, (0, -inputs % step, 0, -outputs % PANEL_OUTPUTS))
    panels = full.view(-1, PANEL_OUTPUTS, full.shape[1] // step, step)
    return panels.transpose(1, 2).contiguous()
