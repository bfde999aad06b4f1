"""LLaVA's text model for a ragged batch of sequences over pages: Llama, Mistral, Qwen2.

transformers' own modules cost 12 to 15 ms of Python and small operations per decode step of 12
layers on two CPU cores, as much as the arithmetic; so the weights are taken out of them and the
layers computed here: the projections of a layer joined, their weights laid out for the device,
normalization, rotation and gating in one operation each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_triton.checkpoint.configuration import text_model_fault
from llava_triton.kernels import Kernels, kernels_for
from llava_triton.kernels.base import AttentionGeometry, Linear, PagedAttention
from llava_triton.kernels.layers import HiddenStates, Layer, Stack


class TextModel:
    """The weights of a LLaVA's text model, and the way of a step through them.

    Args:
        model: transformers' model of a LLaVA family. Its text model's weights are moved
            out of it, layer by layer; it cannot be used afterwards.
        int8_weights: round those of the layers to 8-bit integers.

    Raises:
        ValueError: a family or a feature of one that is not computed here.
    """

    def __init__(self, model: Any, *, int8_weights: bool = False) -> None:
        text = model.model.language_model
        config = model.config.get_text_config()
        fault = text_model_fault(config)
        if fault is not None:
            raise ValueError(fault)
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.geometry = AttentionGeometry(
            heads=heads,
            kv_heads=int(config.num_key_value_heads),
            head_dim=width,
            scale=width**-0.5,
        )
        self.embedding: Tensor = text.get_input_embeddings().weight.detach()
        self.device = self.embedding.device
        self.dtype = self.embedding.dtype
        self.context_length = int(config.max_position_embeddings)
        kernels = kernels_for(self.device)
        attentions: dict[int | None, PagedAttention] = {}
        layers: list[Layer] = []
        for index in range(len(text.layers)):
            window = _window(config, index)
            if window not in attentions:
                attentions[window] = kernels.attention(self.geometry, window)
            layers.append(_layer(text.layers[index], attentions[window], kernels, int8_weights))
            text.layers[index] = None  # its weights live once, packed
        self.layers = len(layers)
        cos, sin = _rotation(text.rotary_emb, self.context_length, self.device)
        epsilon = float(config.rms_norm_eps)
        self.hidden_states: HiddenStates = kernels.join(
            Stack(layers, text.norm.weight.detach(), epsilon, cos, sin)
        )
        self._head = _linear(kernels, False, model.lm_head)
        self.vocabulary = int(model.lm_head.weight.shape[0])
        """How many tokens there are logits for."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[N, W] -> float32 [N, V]."""
        return self._head(hidden_states).float()


def _layer(layer: Any, attention: PagedAttention, kernels: Kernels, int8: bool) -> Layer:
    attend, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_linear(kernels, int8, attend.q_proj, attend.k_proj, attend.v_proj),
        attention=attention,
        output=_linear(kernels, int8, attend.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_linear(kernels, int8, mlp.gate_proj, mlp.up_proj),
        down=_linear(kernels, int8, mlp.down_proj),
    )


def _linear(kernels: Kernels, int8: bool, *modules: Any) -> Linear:
    """The modules' products in one: their outputs side by side."""
    weight = torch.cat([module.weight.detach() for module in modules])
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    if biases and len(biases) != len(modules):
        raise ValueError("some projections of a layer have a bias and others have none")
    return kernels.make_linear(weight, torch.cat(biases) if biases else None, int8)


def _rotation(rotary: Any, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [positions, D / 2], by the checkpoint's own rotary embedding."""
    ids = torch.arange(positions, device=device)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.zeros((), dtype=torch.float32, device=device), ids)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _window(config: Any, layer: int) -> int | None:
    """How far back a layer's tokens see; None: to the beginning."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    if config.model_type == "qwen2" and not config.use_sliding_window:
        return None
    return None if window is None else int(window)
