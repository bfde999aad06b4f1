"""Attention over keys and values in pages, with the operations around it, for each device.

`reference.py` is the slow, plain one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava_triton.paged_attention.interface import AttentionGeometry, PagedAttention


@dataclass(frozen=True)
class Kernels:
    """The operations of a text model's layer that are not matrix products."""

    make_attention: Callable[[AttentionGeometry], PagedAttention]
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    """(residual, delta, weight, epsilon): adds delta [T, W] to residual in place; returns
    residual, normalized, times weight [W]."""
    silu_multiply: Callable[[Tensor], Tensor]
    """[T, 2 * I], gates then values -> silu(gates) * values, [T, I]."""
    int8_product: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(x, weight, scales, bias): x (scales W)^T + b for at most `int8_rows` rows."""
    int8_rows: int
    few_rows_product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """(x, weight, bias): x W^T + b for at most `few_rows` rows, where the device has it."""
    few_rows: int = 0

    def attention(self, geometry: AttentionGeometry, window: int | None) -> PagedAttention:
        """Attention of layers whose tokens see `window` tokens back, or all."""
        return self.make_attention(replace(geometry, window=window))


def kernels_for(device: torch.device) -> Kernels:
    """The fast operations for a device."""
    if device.type == "cuda":
        from llava_triton.paged_attention import gpu

        return Kernels(
            gpu.GpuAttention,
            gpu.add_rms_norm,
            gpu.silu_multiply,
            gpu.int8_product,
            gpu.INT8_ROWS,
        )
    from llava_triton.paged_attention import cpu

    return Kernels(
        cpu.CpuAttention,
        cpu.add_rms_norm,
        cpu.silu_multiply,
        cpu.int8_product,
        cpu.MOST_ROWS,
        cpu.few_rows_product,
        cpu.MOST_ROWS,
    )
