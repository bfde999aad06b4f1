"""All layers of a text model in one call, on a CPU: `layers.cpp`, bound."""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor

from llava_triton.kernels.base import Rows
from llava_triton.kernels.cpu.attention import CpuAttention, cpu_kernels
from llava_triton.kernels.cpu.linear import INT8_ROWS, CpuLinear
from llava_triton.kernels.layers import Layer, Stack


class _Linear(ctypes.Structure):
    """`Linear` of the kernels."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("integers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("integer_rows", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    """`Layer` of the kernels."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("qkv", _Linear),
        ("geometry", ctypes.c_void_p),
        ("output", _Linear),
        ("mlp_norm", ctypes.c_void_p),
        ("gate_up", _Linear),
        ("down", _Linear),
    )


class _Stack(ctypes.Structure):
    """`Stack` of the kernels."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    )


class CpuLayers:
    """Implements `HiddenStates`; a step is one call, during which other threads may run Python.

    The result is that of `OneByOne` with the same kernels, to the last bit.

    Args:
        stack: of `CpuAttention` and `CpuLinear`.
    """

    def __init__(self, stack: Stack) -> None:
        assert stack.cos.dtype == stack.sin.dtype == torch.float32
        assert all(tensor.is_contiguous() for tensor in (stack.cos, stack.sin, stack.norm))
        self._held = stack  # the kernels have its addresses
        (self._width,) = stack.norm.shape
        self._dtype = stack.norm.dtype
        self._layers = (_Layer * len(stack.layers))(*(self._layer(each) for each in stack.layers))
        self._stack = _Stack(
            ctypes.addressof(self._layers),
            len(stack.layers),
            self._width,
            stack.norm.data_ptr(),
            stack.epsilon,
            stack.cos.data_ptr(),
            stack.sin.data_ptr(),
        )
        self._attentions = [cast(CpuAttention, layer.attention) for layer in stack.layers]
        products = [p for layer in self._layers for p in (layer.qkv, layer.gate_up, layer.down)]
        widest = max(max(product.inputs, product.outputs) for product in products)
        self._scratch_width = 2 * self._width + 2 * widest
        self._scratch = stack.norm.new_empty(0)

    def __call__(
        self,
        embeddings: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """See `HiddenStates`."""
        assert embeddings.is_contiguous()
        assert embeddings.dtype == self._dtype
        count, width = embeddings.shape
        assert width == self._width
        for each in (keys, values):
            assert len(each) == len(self._layers)
        assert keys.stride(0) == values.stride(0)
        attention = self._attentions[0]
        attention.check_pages(keys[0], values[0])
        if self._scratch.numel() < count * self._scratch_width:
            # Kept: to get so much anew from the system takes longer than a step's small layers.
            self._scratch = embeddings.new_empty(count * self._scratch_width)
        results = count
        if wanted is not None:
            assert wanted.dtype == torch.int64
            assert wanted.is_contiguous()
            results = len(wanted)
        out = embeddings.new_empty((results, width))
        cpu_kernels(self._dtype).hidden_states(
            ctypes.addressof(self._stack),
            embeddings.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            attention.bind(rows),
            count,
            None if wanted is None else wanted.data_ptr(),
            results,
            self._scratch.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _layer(self, layer: Layer) -> _Layer:
        assert layer.attention_norm.shape == layer.mlp_norm.shape == (self._width,)
        for norm in (layer.attention_norm, layer.mlp_norm):
            assert norm.dtype == self._dtype
            assert norm.is_contiguous()
        return _Layer(
            layer.attention_norm.data_ptr(),
            _linear(cast(CpuLinear, layer.qkv)),
            cast(CpuAttention, layer.attention).geometry_address,
            _linear(cast(CpuLinear, layer.output)),
            layer.mlp_norm.data_ptr(),
            _linear(cast(CpuLinear, layer.gate_up)),
            _linear(cast(CpuLinear, layer.down)),
        )


def _linear(product: CpuLinear) -> _Linear:
    integers, scales, bias = product.integers, product.scales, product.bias
    return _Linear(
        product.weight.data_ptr(),
        None if integers is None else integers.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        product.inputs,
        product.outputs,
        INT8_ROWS[product.dtype],
        product.group,
    )
