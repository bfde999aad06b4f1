"""Products with the weights on a CPU: `products.cpp`, bound."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llava_triton.kernels.cpu.attention import cpu_kernels
from llava_triton.kernels.int4 import Int4Weight, in_groups
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

    8-bit weights are kept twice: as integers, and as floats of the same values for many tokens.
    (Integers up to 127 are exact in both types.) 4-bit weights are kept once; tokens are rounded
    for them, to 16-bit integers that share a scale in each group of inputs.
    """

    def __init__(self, weight: Tensor | Int8Weight | Int4Weight, bias: Tensor | None) -> None:
        self.bias = bias
        self.integers: Tensor | None = None
        self.scales: Tensor | None = None
        self.group = 0
        """Inputs of a group of 4-bit weights; 0: they are others."""
        self.dtype = weight.dtype
        if isinstance(weight, Int4Weight):
            self.outputs, self.inputs = weight.integers.shape
            self.weight, self.group = in_blocks(weight), weight.group
            return
        if isinstance(weight, Int8Weight):
            self.integers, self.scales = in_panels(weight.integers), weight.scales
            weight = weight.integers.to(weight.dtype)
        self.outputs, self.inputs = weight.shape
        self.weight = in_panels(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        assert x.dtype == self.dtype
        assert x.is_contiguous()
        rows, inputs = x.shape
        assert inputs == self.inputs
        kernels = cpu_kernels(x.dtype)
        out = x.new_empty((rows, self.outputs))
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = (rows, inputs, self.outputs)
        threads = torch.get_num_threads()
        if self.group:
            kernels.int4_products(
                x.data_ptr(),
                self.weight.data_ptr(),
                bias,
                out.data_ptr(),
                *sizes,
                self.group,
                threads,
            )
            return out
        kernel, weight, scales = kernels.products, self.weight, self.scales
        if self.integers is not None and rows <= INT8_ROWS[x.dtype]:
            kernel, weight = kernels.int8_products, self.integers
        kernel(
            x.data_ptr(),
            weight.data_ptr(),
            None if scales is None else scales.data_ptr(),
            bias,
            out.data_ptr(),
            *sizes,
            threads,
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


def in_blocks(weight: Int4Weight) -> Tensor:
    """4-bit weights as the kernels read them.

    Returns:
        uint8 [panels, groups, bytes of a block], filled up with zeros: see int4_products.cpp.
    """
    outputs = weight.integers.shape[0]
    more = -outputs % PANEL_OUTPUTS
    # [panels, 32, groups, group / 8, 4 pairs, 2]
    words = functional.pad(in_groups(weight.integers, weight.group), (0, 0, 0, 0, 0, more))
    words = words.view(-1, PANEL_OUTPUTS, words.shape[1], weight.group // 8, 4, 2)
    # Four bits after another: the first of every pair, then the second. Two make a byte.
    nibbles = words.transpose(4, 5).flatten(4).unflatten(4, (4, 2))
    packed = nibbles[..., 0] | nibbles[..., 1] << 4
    packed = packed.permute(0, 2, 3, 1, 4).flatten(2)
    scales, zeros = (
        functional.pad(each, (0, 0, 0, more))
        .view(-1, PANEL_OUTPUTS, each.shape[1])
        .transpose(1, 2)
        .contiguous()
        for each in (weight.scales, weight.zeros.to(torch.int16))
    )
    return torch.cat([packed, scales.view(torch.uint8), zeros.view(torch.uint8)], dim=2)
