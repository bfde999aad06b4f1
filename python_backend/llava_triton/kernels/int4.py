"""Weights as 4-bit integers in groups: about half of what a decode step reads of 8-bit ones.

Each group of a row's inputs has a scale and a zero point of its own. The embedding and the last
matrix, whose rounding shows most, are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128
"""Inputs that share a scale, where the weights are rounded here."""
GROUPS = (32, 64, 128)
"""Sizes that the kernels know."""
LARGEST = 15
_SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""Of a group's range: the extremes are cut off where that brings the others closer. Twice as many
of them, scales fitted by least squares, or HQQ's iterations made logits no better that could be
told from chance; without a zero point, or without the search, they were worse (docs/decisions.md).
"""
_CHUNK = 1 << 20
"""Weights rounded at a time, so that what is in between fits into a cache."""


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A matrix W, rounded."""

    integers: Tensor
    """uint8 [outputs, inputs], 0 to 15; not packed yet: each device has an order of its own."""
    scales: Tensor
    """float32 [outputs, groups], groups = inputs / group, rounded up: the last one may be short."""
    zeros: Tensor
    """uint8 [outputs, groups], 0 to 15: W is about (integers - zero) * scale."""
    group: int
    """Inputs of a group, one of `GROUPS`."""
    dtype: torch.dtype
    """Of the tokens that are multiplied with it."""

    def __post_init__(self) -> None:
        outputs, inputs = self.integers.shape
        assert self.group in GROUPS
        assert self.scales.shape == self.zeros.shape == (outputs, -(-inputs // self.group))
        assert self.integers.dtype == self.zeros.dtype == torch.uint8
        assert self.scales.dtype == torch.float32

    @classmethod
    def of(cls, weight: Tensor) -> Int4Weight:
        """Round a matrix [outputs, inputs] of any float type, each group with the least squared
        error among some ranges. Zero stays zero."""
        outputs, inputs = weight.shape
        count = -(-inputs // GROUP)
        integers = torch.empty((outputs, inputs), dtype=torch.uint8, device=weight.device)
        scales = torch.empty((outputs, count), dtype=torch.float32, device=weight.device)
        zeros = torch.empty((outputs, count), dtype=torch.uint8, device=weight.device)
        step = max(1, _CHUNK // inputs)
        for first in range(0, outputs, step):
            part = slice(first, first + step)
            grouped = in_groups(weight[part].float(), GROUP)
            rounded, scale, zero = _round(grouped)
            integers[part] = rounded.flatten(1)[:, :inputs]
            scales[part], zeros[part] = scale, zero
        return cls(integers, scales, zeros, GROUP, weight.dtype)

    @classmethod
    def of_parts(
        cls, integers: Tensor, scales: Tensor, zeros: Tensor, group: int, dtype: torch.dtype
    ) -> Int4Weight:
        """As a checkpoint has it.

        Args:
            integers: uint8 [outputs, inputs].
            scales: float32 [outputs, groups].
            zeros: uint8 [outputs, groups].
            group: inputs, one of `GROUPS` or a multiple of `GROUP`, which becomes several groups
                with the same scale; below 0: all inputs.
            dtype: of the tokens.
        """
        if group not in GROUPS:
            count = -(-integers.shape[1] // GROUP)
            times = count if group < 0 else group // GROUP
            scales, zeros = (
                each.repeat_interleave(times, dim=1)[:, :count] for each in (scales, zeros)
            )
            group = GROUP
        return cls(integers.contiguous(), scales.contiguous(), zeros.contiguous(), group, dtype)

    @classmethod
    def joined(cls, parts: Sequence[Int4Weight]) -> Int4Weight:
        """Matrices of the same inputs, in the same groups, one below the other."""
        first = parts[0]
        assert all((each.group, each.dtype) == (first.group, first.dtype) for each in parts)
        integers, scales, zeros = (
            torch.cat([getattr(each, name) for each in parts])
            for name in ("integers", "scales", "zeros")
        )
        return cls(integers, scales, zeros, first.group, first.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The rounded matrix as floats, [outputs, inputs]."""
        grouped = in_groups(self.integers, self.group).float()
        whole = (grouped - self.zeros[..., None].float()) * self.scales[..., None]
        return whole.flatten(1)[:, : self.integers.shape[1]].to(dtype).contiguous()


def in_groups(matrix: Tensor, group: int) -> Tensor:
    """[outputs, inputs] -> [outputs, groups, group], filled up with zeros."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % group))
    return padded.view(len(matrix), -1, group)


def _round(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Floats [outputs, groups, group] to integers of that shape, scales and zero points."""
    least = grouped.amin(2, keepdim=True).clamp_max(0.0)
    span = (grouped.amax(2, keepdim=True).clamp_min(0.0) - least) / LARGEST
    span.clamp_min_(torch.finfo(torch.float32).tiny)
    start = -least / span  # where zero is, among 0 to 15: shrinking does not move it
    zero = start.round()
    best_error = torch.full_like(span, torch.inf)
    best_scale = span
    for shrink in _SHRINKS:
        scale = span * shrink
        error = (_integers(grouped, scale, zero) - zero).mul_(scale).sub_(grouped)
        error = error.square_().sum(2, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    integers = _integers(grouped, best_scale, zero)
    return integers.to(torch.uint8), best_scale.squeeze(2), zero.squeeze(2).to(torch.uint8)


def _integers(grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (grouped / scale).add_(zero).round_().clamp_(0.0, LARGEST)
