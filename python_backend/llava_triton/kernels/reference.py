"""Paged attention in plain torch: slow, on any device, to measure the others against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_triton.kernels.base import BLOCK_TOKENS, AttentionGeometry, Rows


class ReferenceAttention:
    """Implements `PagedAttention` one sequence at a time, with arithmetic in float32."""

    def __init__(self, geometry: AttentionGeometry) -> None:
        self._geometry = geometry

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Rows
    ) -> None:
        """See `PagedAttention.rotate_and_store`."""
        queries, new_keys, new_values = self._heads(qkv)
        cos, sin = cos[rows.positions][:, None], sin[rows.positions][:, None]  # [T, 1, D / 2]
        queries.copy_(_rotated(queries, cos, sin))
        new_keys = _rotated(new_keys, cos, sin).to(keys.dtype)
        for sequence, first, end in _sequences(rows):
            positions = rows.positions[first:end]
            blocks = rows.block_tables[sequence][positions // BLOCK_TOKENS].long()
            slots = positions % BLOCK_TOKENS
            keys[blocks, :, :, slots] = new_keys[first:end]
            values[blocks, :, slots] = new_values[first:end]

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """See `PagedAttention.attend`."""
        queries, _, _ = self._heads(qkv)
        return torch.cat(
            [
                self._attend(
                    queries[first:end],
                    *self._gathered(keys, values, rows, sequence, end - first),
                    rows.positions[first:end],
                )
                for sequence, first, end in _sequences(rows)
            ]
        )

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of [T, qkv_width]: queries [T, H, D], keys and values [T, G, D]."""
        heads, kv_heads = self._geometry.heads, self._geometry.kv_heads
        by_head = qkv.view(len(qkv), heads + 2 * kv_heads, self._geometry.head_dim)
        queries, keys, values = by_head.split([heads, kv_heads, kv_heads], dim=1)
        return queries, keys, values

    def _gathered(
        self, keys: Tensor, values: Tensor, rows: Rows, sequence: int, new_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, each float32 [tokens, H, D]."""
        tokens = int(rows.contexts[sequence]) + new_tokens
        blocks = rows.block_tables[sequence, : -(-tokens // BLOCK_TOKENS)].long()
        group = self._geometry.heads // self._geometry.kv_heads
        return (
            keys[blocks]
            .permute(0, 3, 1, 2)
            .flatten(0, 1)[:tokens]
            .repeat_interleave(group, 1)
            .float(),
            values[blocks]
            .transpose(1, 2)
            .flatten(0, 1)[:tokens]
            .repeat_interleave(group, 1)
            .float(),
        )

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Queries [N, H, D] at `positions` [N] over a sequence's keys and values: [N, H * D]."""
        scores = torch.einsum("nhd,mhd->hnm", queries.float(), keys) * self._geometry.scale
        # Each query [N, 1] looks back so many tokens to each key [1, M].
        distance = positions[:, None] - torch.arange(len(keys), device=positions.device)[None]
        seen = distance >= 0
        if self._geometry.window is not None:
            seen &= distance < self._geometry.window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, values).flatten(1).to(queries.dtype)


def _sequences(rows: Rows) -> Iterator[tuple[int, int, int]]:
    """Index, first row and end row of every sequence."""
    starts: list[int] = rows.starts.tolist()
    for sequence in range(len(starts) - 1):
        yield sequence, starts[sequence], starts[sequence + 1]


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [T, *, D] by [T, 1, D / 2]; float32."""
    x1, x2 = heads.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
