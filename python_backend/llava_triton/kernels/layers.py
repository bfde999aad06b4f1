"""The layers of a text model: what they hold, and the way of a step's tokens through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llava_triton.kernels.base import Linear, PagedAttention, Rows

AddRmsNorm = Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
"""(residual, delta, weight, epsilon): adds delta [T, W] to residual in place; returns residual,
normalized, times weight [W]."""
SiluMultiply = Callable[[Tensor], Tensor]
"""[T, 2 * I], gates then values -> silu(gates) * values, [T, I]."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of one layer, of width W with H query heads, G key-value heads of width D, and I
    inner values; all in the type of the model."""

    attention_norm: Tensor
    """[W]"""
    qkv: Linear
    """[T, W] -> [T, (H + 2 * G) * D]: queries, keys, values."""
    attention: PagedAttention
    output: Linear
    """[T, H * D] -> [T, W]"""
    mlp_norm: Tensor
    """[W]"""
    gate_up: Linear
    """[T, W] -> [T, 2 * I]: gates, values."""
    down: Linear
    """[T, I] -> [T, W]"""


@dataclass(frozen=True, eq=False)
class Stack:
    """All layers, and what they share."""

    layers: Sequence[Layer]
    norm: Tensor
    """[W], of the last layer's output."""
    epsilon: float
    """Of all norms."""
    cos: Tensor
    """float32 [positions, D / 2], see `PagedAttention.rotate_and_store`."""
    sin: Tensor
    """Like `cos`."""


class HiddenStates(Protocol):
    """The way through a stack."""

    def __call__(
        self,
        embeddings: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Compute a step's tokens; their keys and values are written to the pages.

        Args:
            embeddings: [T, W] of tokens and image features; overwritten.
            keys: of all layers, see `Pages`.
            values: likewise.
            rows: which token belongs where.
            wanted: int64 [N], ascending: the tokens whose result is needed; None: all. Behind its
                attention the last layer computes no others: of a prompt, only the last one.

        Returns:
            [N, W], normalized.
        """


class OneByOne:
    """Implements `HiddenStates`, one operation after another."""

    def __init__(self, stack: Stack, norm: AddRmsNorm, gate: SiluMultiply) -> None:
        self._stack, self._norm, self._gate = stack, norm, gate

    def __call__(
        self,
        embeddings: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """See `HiddenStates`."""
        stack, norm, gate = self._stack, self._norm, self._gate
        residual, delta = embeddings, None
        for index, layer in enumerate(stack.layers):
            qkv = layer.qkv(norm(residual, delta, layer.attention_norm, stack.epsilon))
            attention = layer.attention
            attention.rotate_and_store(qkv, stack.cos, stack.sin, keys[index], values[index], rows)
            attended = attention.attend(qkv, keys[index], values[index], rows)
            if wanted is not None and index + 1 == len(stack.layers):
                residual, attended = residual[wanted], attended[wanted]
            delta = layer.output(attended)
            hidden = norm(residual, delta, layer.mlp_norm, stack.epsilon)
            delta = layer.down(gate(layer.gate_up(hidden)))
        return norm(residual, delta, stack.norm, stack.epsilon)
