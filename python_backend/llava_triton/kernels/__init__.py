"""Attention over keys and values in pages, with the operations around it, for each device.

`reference.py` is the slow, plain one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_triton.kernels.base import AttentionGeometry, Linear, PagedAttention
from llava_triton.kernels.int4 import Int4Weight
from llava_triton.kernels.int8 import Int8Weight
from llava_triton.kernels.layers import HiddenStates, OneByOne, Stack

Weight = Tensor | Int8Weight | Int4Weight
"""A matrix, of floats or rounded."""
ROUNDINGS: dict[str, Callable[[Tensor], Weight]] = {
    "unrounded": lambda weight: weight,
    "int8": Int8Weight.of,
    "int4": Int4Weight.of,
}
"""By the setting `weights`."""


@dataclass(frozen=True)
class Kernels:
    """The operations of a text model's layer."""

    make_attention: Callable[[AttentionGeometry], PagedAttention]
    make_linear: Callable[[Weight, Tensor | None], Linear]
    """(weight [outputs, inputs], bias [outputs] or None) -> the product with them. The weight is
    not used any more afterwards."""
    join: Callable[[Stack], HiddenStates]
    """The way through layers made of these operations."""
    keys_by_token: bool = False
    """Whether keys lie in their pages as values do; see `PagedAttention`."""

    def attention(self, geometry: AttentionGeometry, window: int | None) -> PagedAttention:
        """Attention of layers whose tokens see `window` tokens back, or all."""
        return self.make_attention(replace(geometry, window=window))


def kernels_for(device: torch.device) -> Kernels:
    """The fast operations for a device."""
    if device.type == "cuda":
        from llava_triton.kernels.gpu.attention import GpuAttention, add_rms_norm, silu_multiply
        from llava_triton.kernels.gpu.linear import GpuLinear

        return Kernels(
            GpuAttention,
            GpuLinear,
            lambda stack: OneByOne(stack, add_rms_norm, silu_multiply),
            keys_by_token=True,
        )
    from llava_triton.kernels.cpu.attention import CpuAttention
    from llava_triton.kernels.cpu.layers import CpuLayers
    from llava_triton.kernels.cpu.linear import CpuLinear

    return Kernels(CpuAttention, CpuLinear, CpuLayers)
