"""float16 where it is fast, float32 where CLIP needs it.

Written into the module itself, and so into the ONNX graph, rather than left to a builder's
judgement: a strongly typed TensorRT network runs every operation in the type it is given here.
Matrix products and convolutions take float16 operands; LayerNorm, softmax, activations, and the
residual stream between them stay float32, where CLIP's large activations cannot overflow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from llava_triton.checkpoint.vision_tower import VisionEncoder

_ATTENTION = "float16_products"


class HalfLinear(nn.Linear):
    """float32 in and out, with a float16 product between."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Args: input float32 [..., in]. Returns float32 [..., out]."""
        return _in_half(functional.linear, input, self.weight, self.bias)


class HalfConv2d(nn.Conv2d):
    """float32 in and out, with a float16 convolution between."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Args: input float32 [N, C, H, W]. Returns float32 [N, C', H', W']."""
        return _in_half(self._conv_forward, input, self.weight, self.bias)


def half_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with float16 products around a float32 softmax; no mask, as vision towers have.

    Args:
        query, key, value: float32 [N, heads, T, head size].
        scaling: of the scores; applied before the product, which could overflow otherwise.

    Returns:
        float32 [N, T, heads, head size], and no attention weights.
    """
    scores = _in_half(torch.matmul, query * scaling, key.transpose(-1, -2))
    attended = _in_half(torch.matmul, torch.softmax(scores, dim=-1), value)
    return attended.transpose(1, 2).contiguous(), None


def _in_half(product: Callable[..., torch.Tensor], *operands: torch.Tensor | None) -> torch.Tensor:
    """`product` in float16, its result in float32.

    In an exported graph these are float16 operations. Run here, they are computed as a GPU's
    tensor cores do it, whatever this machine is: float16 operands, float32 sums, a float16 result.
    """
    half = [operand if operand is None else operand.half() for operand in operands]
    if torch.compiler.is_exporting():
        return product(*half).float()
    return product(*[each if each is None else each.float() for each in half]).half().float()


AttentionInterface.register(_ATTENTION, half_attention)


def to_mixed_precision(encoder: VisionEncoder) -> VisionEncoder:
    """A copy of a float32 encoder with float16 weights in its matrix products and convolutions."""
    mixed = copy.deepcopy(encoder)
    for module in mixed.modules():
        if type(module) is nn.Linear:
            module.__class__ = HalfLinear
            module.half()
        elif type(module) is nn.Conv2d:
            module.__class__ = HalfConv2d
            module.half()
    mixed.vision_tower.set_attn_implementation(_ATTENTION)
    return mixed
