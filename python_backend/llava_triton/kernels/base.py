"""What every implementation does, and how keys and values lie in the pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

BLOCK_TOKENS = 16
"""Tokens of one block (page) of keys and values."""


@dataclass(frozen=True)
class AttentionGeometry:
    """The attention of one text model; its layers are alike."""

    heads: int
    """Query heads `H`."""
    kv_heads: int
    """Key-value heads `G`; `heads` is a multiple of it."""
    head_dim: int
    """Width `D` of a head, even."""
    scale: float
    """Factor of the query-key products, before the softmax."""
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None: everything before it."""

    @property
    def qkv_width(self) -> int:
        """Columns of a token's fused projection: H query heads, then G keys, then G values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, eq=False)
class Rows:
    """The tokens of one step: those of a sequence side by side, one sequence after the other.

    Sequence `s` has `contexts[s]` tokens in its pages from earlier steps; this step brings the rows
    `starts[s]` to `starts[s + 1] - 1`, at least one. Its token at position `p` (counted from the
    sequence's first) lies in block `block_tables[s, p // BLOCK_TOKENS]`, at slot
    `p % BLOCK_TOKENS`; entries of the table beyond its last token's are arbitrary and never
    looked at.

    All tensors are contiguous and lie on the model's device.
    """

    starts: Tensor
    """int32 [S + 1], from 0 to T."""
    contexts: Tensor
    """int32 [S]."""
    block_tables: Tensor
    """int32 [S, B]."""
    positions: Tensor
    """int64 [T]: of each row's token in its sequence."""


class PagedAttention(Protocol):
    """Attention over keys and values in pages, for a ragged batch of sequences.

    One layer's pages are `values` [blocks, G, BLOCK_TOKENS, D] and `keys`, contiguous, of the dtype
    of `qkv`. Keys are [blocks, G, D, BLOCK_TOKENS] (a block's tokens side by side, as a CPU's
    vectors want them) or, where `Kernels.keys_by_token` says so, as values are.
    """

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Rows
    ) -> None:
        """Apply the rotary embedding to queries and keys; write keys and values to the pages.

        Args:
            qkv: [T, qkv_width]; its queries are rotated in place, its keys and values are left in
                an unspecified state.
            cos: float32 [positions, D / 2]: row p belongs to position p. Halves are rotated
                (x1 * cos - x2 * sin, x2 * cos + x1 * sin), as in transformers' Llama.
            sin: likewise.
            keys: the layer's.
            values: the layer's.
            rows: which token goes where.
        """

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """Causal attention of every row's token over its sequence, itself included.

        Returns:
            [T, H * D], of the dtype of `qkv`. A sequence's result does not depend on which other
            sequences are in the batch.
        """


class Linear(Protocol):
    """Tokens times a matrix of weights, plus a bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b.

        Args:
            x: [T, inputs], of the weights' dtype, contiguous.

        Returns:
            [T, outputs].
        """
