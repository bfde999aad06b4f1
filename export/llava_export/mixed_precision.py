"""float16 where it is fast, float32 where CLIP needs it.

Written into the module itself, and so into the ONNX graph, rather than left to a builder's
judgement: a strongly typed TensorRT network runs every operation in the type it is given here.
Matrix products and convolutions take float16 operands; LayerNorm, softmax, activations, and the
residual stream between them stay float32, where CLIP's large activations cannot overflow.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from llava_export.vision import VisionEncoder

_ATTENTION = "float16_products"


class HalfLinear(nn.Linear):
    """float32 in and out, with a float16 product between."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Args: input float32 [..., in]. Returns float32 [..., out]."""
        return functional.linear(input.half(), self.weight, self.bias).float()


class HalfConv2d(nn.Conv2d):
    """float32 in and out, with a float16 convolution between."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Args: input float32 [N, C, H, W]. Returns float32 [N, C', H', W']."""
        return super().forward(input.half()).float()


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
    scores = torch.matmul((query * scaling).half(), key.half().transpose(-1, -2))
    weights = torch.softmax(scores.float(), dim=-1)
    attended = torch.matmul(weights.half(), value.half()).float()
    return attended.transpose(1, 2).contiguous(), None


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
