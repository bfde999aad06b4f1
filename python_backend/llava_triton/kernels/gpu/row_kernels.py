"""The small layers around attention, on a GPU, in the Triton language; launched by `attention.py`.

All tensors are contiguous. What a kernel is compiled for is in capitals.
"""

# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from llava_triton.kernels.gpu.attention_kernels import VARYING, dot


@triton.jit
def add_rms_norm(
    residual: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
) -> None:
    """One program a row. Rounds where transformers' `LlamaRMSNorm` on residual + delta does."""
    column = tl.arange(0, PADDED_WIDTH)
    mask = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    row = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)
        rounded = row.to(residual.dtype.element_ty)
        tl.store(residual + place, rounded, mask=mask)
        row = rounded.to(tl.float32)
    normal = row * tl.rsqrt(tl.sum(row * row, axis=0) / WIDTH + eps)
    normal = normal.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (normal * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def silu_multiply(
    gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """Gates then values [T, 2 * WIDTH] to silu(gates) * values. Grid: (T, tiles of COLUMNS)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=mask, other=0.0)
    product = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out + row * WIDTH + column, product.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def int8_product(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """x [rows, INPUTS] times int8 weight [OUTPUTS, INPUTS], transposed. Grid: (tiles of M rows,
    tiles of N outputs). The integers become floats on their way from shared memory to the product.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    output = tl.program_id(1) * N + tl.arange(0, N)
    column = tl.arange(0, K)
    x_place = x + row[:, None] * INPUTS + column[None, :]
    weight_place = weight + output[:, None].to(tl.int64) * INPUTS + column[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, INPUTS, K):
        inside = first + column < INPUTS
        some_x = tl.load(x_place + first, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        some_weight = tl.load(
            weight_place + first, mask=(output < OUTPUTS)[:, None] & inside[None, :], other=0
        )
        # Through float32, as a GPU does anyway: the interpreter has no bfloat16 of integers.
        factors = tl.trans(some_weight.to(tl.float32).to(some_x.dtype))
        total = dot(some_x, factors, total)
    total *= tl.load(scales + output, mask=output < OUTPUTS, other=0.0)[None, :]
    if BIAS:
        shift = tl.load(bias + output, mask=output < OUTPUTS, other=0.0)
        total += shift.to(tl.float32)[None, :]
    place = out + row[:, None] * OUTPUTS + output[None, :]
    mask = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def int4_product(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """x [rows, INPUTS] times 4-bit weights, transposed: bytes [OUTPUTS, GROUPS, HALF], the first
    half of a group in their low bits; scales and zero points [GROUPS, OUTPUTS]. Grid: (tiles of M
    rows, tiles of N outputs)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    output = tl.program_id(1) * N + tl.arange(0, N)
    column = tl.arange(0, HALF)
    is_row, is_output = row < rows, output < OUTPUTS
    x_place = x + row[:, None] * INPUTS + column[None, :]
    weight_place = weight + output[:, None].to(tl.int64) * (GROUPS * HALF) + column[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    for group in range(0, GROUPS):
        first = group * 2 * HALF
        in_low, in_high = first + column < INPUTS, first + HALF + column < INPUTS
        low_x = tl.load(x_place + first, mask=is_row[:, None] & in_low[None, :], other=0.0)
        high_x = tl.load(x_place + first + HALF, mask=is_row[:, None] & in_high[None, :], other=0.0)
        both = tl.load(weight_place + group * HALF, mask=is_output[:, None], other=0)
        place = group * OUTPUTS + output
        zero = tl.load(zeros + place, mask=is_output, other=0).to(tl.float32)[:, None]
        # Through float32, as in `int8_product`; whole numbers up to 15 are exact in every type.
        low = ((both & 15).to(tl.float32) - zero).to(x.dtype.element_ty)
        high = ((both >> 4).to(tl.float32) - zero).to(x.dtype.element_ty)
        sums = dot(low_x, tl.trans(low), tl.zeros((M, N), dtype=tl.float32))
        sums = dot(high_x, tl.trans(high), sums)
        total += sums * tl.load(scales + place, mask=is_output, other=0.0)[None, :]
    if BIAS:
        shift = tl.load(bias + output, mask=is_output, other=0.0)
        total += shift.to(tl.float32)[None, :]
    place = out + row[:, None] * OUTPUTS + output[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
