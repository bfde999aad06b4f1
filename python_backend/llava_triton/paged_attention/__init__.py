"""Attention over keys and values in pages, with the operations around it, for each device.

`reference.py` is the slow, plain one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_triton.paged_attention.interface import AttentionGeometry, Linear, PagedAttention


@dataclass(frozen=True)
class Kernels:
    """The operations of a text model's layer."""

    make_attention: Callable[[AttentionGeometry], PagedAttention]
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    """(residual, delta, weight, epsilon): adds delta [T, W] to residual in place; returns
    residual, normalized, times weight [W]."""
    silu_multiply: Callable[[Tensor], Tensor]
    """[T, 2 * I], gates then values -> silu(gates) * values, [T, I]."""
    make_linear: Callable[[Tensor, Tensor | None, bool], Linear]
    """(weight [outputs, inputs], bias [outputs] or None, int8: round the weights to 8-bit integers)
    -> the product with them. The weight is not used any more afterwards."""

    def attention(self, geometry: AttentionGeometry, window: int | None) -> PagedAttention:
        """Attention of layers whose tokens see `window` tokens back, or all."""
        return self.make_attention(replace(geometry, window=window))


def kernels_for(device: torch.device) -> Kernels:
    """The fast operations for a device."""
    if device.type == "cuda":
        from llava_triton.paged_attention import gpu, gpu_linear

        return Kernels(gpu.GpuAttention, gpu.add_rms_norm, gpu.silu_multiply, gpu_linear.GpuLinear)
    from llava_triton.paged_attention import cpu, cpu_linear

    return Kernels(cpu.CpuAttention, cpu.add_rms_norm, cpu.silu_multiply, cpu_linear.CpuLinear)
