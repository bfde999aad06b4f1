"""Kernels that step 1 of `make gpu-check` measures and nothing else uses: whether they are worth
having is what it asks."""

# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FEW_ROWS = 8
"""Rows that `few_row_product` takes at the most."""


@triton.jit
def _nothing(out: tl.tensor, DEPENDENT: tl.constexpr) -> None:
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(out, 1.0)


def nothing(out: Tensor, *, dependent: bool) -> None:
    """A kernel that writes one number, float32 [1]: what a node of a graph costs by itself.

    Args:
        out: written to.
        dependent: launched while the one before still ends (programmatic dependent launch, from
            compute capability 9.0 on).
    """
    options = {"launch_pdl": True} if dependent else {}
    _nothing[(1,)](out, DEPENDENT=dependent, num_warps=1, **options)


@triton.jit
def _few_row_product(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    output = tl.program_id(0) * N + tl.arange(0, N)
    column = tl.arange(0, K)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, N], tl.float32)
    for first in range(0, INPUTS, K):
        inside = first + column < INPUTS
        some = tl.load(
            weight + output[:, None].to(tl.int64) * INPUTS + (first + column)[None, :],
            mask=(output < OUTPUTS)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        some_x = tl.load(
            x + row[:, None] * INPUTS + (first + column)[None, :], mask=inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(some_x[:, None, :] * some[None, :, :], axis=2)
    tl.store(
        out + row[:, None] * OUTPUTS + output[None, :],
        total.to(out.dtype.element_ty),
        mask=(output < OUTPUTS)[None, :],
    )


def few_row_product(x: Tensor, weight: Tensor, *, dependent: bool) -> Tensor:
    """x W^T without tensor cores.

    Args:
        x: [T, inputs], T a power of two up to `FEW_ROWS`, contiguous, as is the weight.
        weight: [outputs, inputs].
        dependent: as for `nothing`.

    Returns:
        [T, outputs].
    """
    rows, inputs = x.shape
    outputs = len(weight)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    options = {"launch_pdl": True} if dependent else {}
    _few_row_product[(-(-outputs // 8),)](
        x,
        weight,
        out,
        ROWS=rows,
        INPUTS=inputs,
        OUTPUTS=outputs,
        N=8,
        K=512 if rows <= 2 else 256,
        DEPENDENT=dependent,
        num_warps=4,
        **options,
    )
    return out
