"""LLaVA's text model for a ragged batch of sequences over pages: Llama, Mistral, Qwen2.

transformers' own modules cost 12 to 15 ms of Python and small operations per decode step of 12
layers on two CPU cores, as much as the arithmetic. So the layers are computed here: the projections
of a layer joined, their weights laid out for the device, normalization, rotation and gating in one
operation each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_triton.checkpoint.configuration import text_model_fault
from llava_triton.checkpoint.loader import Checkpoint
from llava_triton.kernels import ROUNDINGS, Weight, kernels_for
from llava_triton.kernels.base import AttentionGeometry, Linear, PagedAttention
from llava_triton.kernels.int4 import Int4Weight
from llava_triton.kernels.layers import HiddenStates, Layer, Stack


class TextModel:
    """The weights of a LLaVA's text model, and the way of a step through them.

    They are read layer by layer, to the device and in the order that it wants them in: beside what
    the model keeps, memory holds a layer at the most.

    Args:
        checkpoint: of a LLaVA family.
        weights: what those of the layers are rounded to, as in `Settings.weights`; those that are
            4-bit integers in the checkpoint stay so.

    Raises:
        ValueError: a family or a feature of one that is not computed here; weights that cannot be
            rounded so.
        CheckpointError: the weights cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, *, weights: str = "unrounded") -> None:
        text = checkpoint.skeleton.model.language_model
        config = checkpoint.skeleton.config.get_text_config()
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
        self.device, self.dtype = checkpoint.device, checkpoint.dtype
        self.context_length = int(config.max_position_embeddings)
        self.vocabulary = int(config.vocab_size)
        """How many tokens there are logits for."""
        self.kernels = kernels_for(self.device)
        self._weights, self._rounding = checkpoint.weights, weights
        attentions: dict[int | None, PagedAttention] = {}
        layers: list[Layer] = []
        for index in range(len(text.layers)):
            window = _window(config, index)
            if window not in attentions:
                attentions[window] = self.kernels.attention(self.geometry, window)
            layers.append(self._layer(f"layers.{index}", attentions[window]))
        self.layers = len(layers)
        rotary = type(text.rotary_emb)(config)  # the one there has no numbers
        cos, sin = _rotation(rotary, self.context_length, self.device)
        epsilon = float(config.rms_norm_eps)
        self.hidden_states: HiddenStates = self.kernels.join(
            Stack(layers, self._read("norm.weight"), epsilon, cos, sin)
        )
        self.embedding = self._read("embed_tokens.weight")
        """[tokens, W]"""
        head = self.embedding
        if "lm_head.weight" in self._weights:  # else it is the embedding's
            head = self._read("lm_head.weight")
        self._head = self.kernels.make_linear(head, None)

    def logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, W] -> float32 [N, V]; `out`, of that type and shape, is where it is written to."""
        logits = self._head(hidden_states)
        return logits.float() if out is None else out.copy_(logits)

    def _layer(self, name: str, attention: PagedAttention) -> Layer:
        attend, mlp = f"{name}.self_attn", f"{name}.mlp"
        return Layer(
            attention_norm=self._read(f"{name}.input_layernorm.weight"),
            qkv=self._linear(f"{attend}.q_proj", f"{attend}.k_proj", f"{attend}.v_proj"),
            attention=attention,
            output=self._linear(f"{attend}.o_proj"),
            mlp_norm=self._read(f"{name}.post_attention_layernorm.weight"),
            gate_up=self._linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=self._linear(f"{mlp}.down_proj"),
        )

    def _linear(self, *modules: str) -> Linear:
        """The modules' products in one: their outputs side by side."""
        biases = [f"{name}.bias" for name in modules if f"{name}.bias" in self._weights]
        if biases and len(biases) != len(modules):
            raise ValueError("some projections of a layer have a bias and others have none")
        bias = self._read(*biases) if biases else None
        return self.kernels.make_linear(self._weight(*modules), bias)

    def _weight(self, *modules: str) -> Weight:
        """The modules' matrices one below the other, rounded as the checkpoint or the setting has
        it."""
        packed = [name for name in modules if self._weights.is_packed(name)]
        if not packed:
            return ROUNDINGS[self._rounding](self._read(*(f"{name}.weight" for name in modules)))
        if len(packed) != len(modules):
            raise ValueError(
                f"{', '.join(packed)} have 4-bit weights, and what is multiplied together with "
                "them has not; give a checkpoint that has all of a layer in 4 bits, or the one it "
                "was made from"
            )
        if self._rounding == "int8":
            raise ValueError(
                "the checkpoint's weights are 4-bit integers already; the setting weights is "
                "'int8' and must be 'unrounded' or 'int4'"
            )
        parts = [self._weights.packed(name, self.device) for name in packed]
        return Int4Weight.joined([Int4Weight.of_parts(*each, dtype=self.dtype) for each in parts])

    def _read(self, *names: str) -> Tensor:
        """The tensors one below the other, where and in what the model computes."""
        shapes = [self._weights.shape(name) for name in names]
        if None in shapes:
            raise KeyError(names[shapes.index(None)])
        rows = [shape[0] for shape in shapes if shape is not None]
        whole = torch.empty(
            (sum(rows), *(shapes[0] or ())[1:]), dtype=self.dtype, device=self.device
        )
        for name, part in zip(names, whole.split(rows), strict=True):
            self._weights.read_into(name, part)
        return whole


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
