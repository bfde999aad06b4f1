"""Paged attention and the small layers around it, on a CPU: `attention.cpp`, bound."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava_triton.kernels.base import BLOCK_TOKENS, AttentionGeometry, Rows
from llava_triton.kernels.cpu.build import load_kernels

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Geometry(ctypes.Structure):
    """`Geometry` of the kernels."""

    _fields_ = (
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
    )


class _Batch(ctypes.Structure):
    """`Batch` of the kernels."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("contexts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
    )


class CpuKernels(NamedTuple):
    """The functions for one dtype."""

    rotate_and_store: Callable[..., None]
    attend: Callable[..., None]
    add_rms_norm: Callable[..., None]
    silu_multiply: Callable[..., None]
    products: Callable[..., None]
    int8_products: Callable[..., None]
    int4_products: Callable[..., None]
    hidden_states: Callable[..., None]


@functools.cache
def cpu_kernels(dtype: torch.dtype) -> CpuKernels:
    """Compiled and bound; their last argument is a number of threads.

    Raises:
        KernelBuildError: they cannot be compiled here.
    """
    library = load_kernels()
    pointer, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

    def function(name: str, *arguments: type) -> Callable[..., None]:
        found = library[f"{name}_{_SUFFIXES[dtype]}"]
        found.argtypes = (*arguments, threads)
        found.restype = None
        return found

    return CpuKernels(
        rotate_and_store=function("rotate_and_store", *[pointer] * 7),
        attend=function("attend", *[pointer] * 6),
        add_rms_norm=function(
            "add_rms_norm", *[pointer] * 3, ctypes.c_float, pointer, count, count
        ),
        silu_multiply=function("silu_multiply", pointer, pointer, count, count),
        products=function("products", *[pointer] * 5, *[count] * 3),
        int8_products=function("int8_products", *[pointer] * 5, *[count] * 3),
        int4_products=function("int4_products", *[pointer] * 4, *[count] * 4),
        hidden_states=function(
            "hidden_states", *[pointer] * 4, count, pointer, count, pointer, count, *[pointer] * 2
        ),
    )


def release_workers() -> None:
    """End the OpenMP workers of the calling thread, torch's and the kernels'."""
    load_kernels().release_workers()


class CpuAttention:
    """Implements `PagedAttention` for float32 and bfloat16, with arithmetic in float32.

    A sequence's result is the same to the last bit whatever else is in the batch.

    Raises:
        KernelBuildError: on creation, where the kernels cannot be compiled.
    """

    def __init__(self, geometry: AttentionGeometry) -> None:
        self._geometry = _Geometry(
            geometry.heads,
            geometry.kv_heads,
            geometry.head_dim,
            geometry.scale,
            geometry.window or 0,
        )
        self.geometry_address = ctypes.addressof(self._geometry)
        self._out_width = geometry.heads * geometry.head_dim
        self._qkv_width = geometry.qkv_width
        self._page_elements = geometry.kv_heads * geometry.head_dim * BLOCK_TOKENS
        self._rows: Rows | None = None
        self._batch = _Batch()
        self._batch_address = ctypes.addressof(self._batch)
        cpu_kernels(torch.float32)  # what cannot be built should be known at once

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Rows
    ) -> None:
        """See `PagedAttention.rotate_and_store`."""
        self._check(qkv, keys, values)
        assert cos.dtype == sin.dtype == torch.float32
        assert all(tensor.is_contiguous() for tensor in (cos, sin))
        cpu_kernels(qkv.dtype).rotate_and_store(
            self.geometry_address,
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            self.bind(rows),
            torch.get_num_threads(),
        )

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """See `PagedAttention.attend`."""
        self._check(qkv, keys, values)
        out = qkv.new_empty((len(qkv), self._out_width))
        cpu_kernels(qkv.dtype).attend(
            self.geometry_address,
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            self.bind(rows),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def bind(self, rows: Rows) -> int:
        """The address of the kernels' view of `rows`, made once for all layers of a step."""
        if rows is not self._rows:
            for tensor in (rows.starts, rows.contexts, rows.block_tables):
                assert tensor.dtype == torch.int32
                assert tensor.is_contiguous()
            assert rows.positions.dtype == torch.int64
            assert rows.positions.is_contiguous()
            self._rows = rows
            self._batch.starts = rows.starts.data_ptr()
            self._batch.contexts = rows.contexts.data_ptr()
            self._batch.tables = rows.block_tables.data_ptr()
            self._batch.positions = rows.positions.data_ptr()
            self._batch.sequences, self._batch.table_width = rows.block_tables.shape
        return self._batch_address

    def _check(self, qkv: Tensor, keys: Tensor, values: Tensor) -> None:
        """What would otherwise read or write past a tensor."""
        assert qkv.dtype == keys.dtype
        assert qkv.is_contiguous()
        assert qkv.shape[1] == self._qkv_width
        self.check_pages(keys, values)

    def check_pages(self, keys: Tensor, values: Tensor) -> None:
        """Whether they are a layer's: what would otherwise be read or written past their end."""
        assert keys.dtype == values.dtype
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert keys.stride(0) == values.stride(0) == self._page_elements


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `residual` in place, then normalize, as transformers' `LlamaRMSNorm` does.

    Args:
        residual: float32 or bfloat16 [T, W], contiguous, as are the others.
        delta: [T, W]; None adds nothing.
        weight: [W].
        eps: added to the mean square.

    Returns:
        [T, W], residual / root mean square * weight.
    """
    assert residual.dtype == weight.dtype
    assert residual.shape[1:] == weight.shape
    assert all(tensor.is_contiguous() for tensor in (residual, weight))
    if delta is not None:
        assert delta.dtype == residual.dtype
        assert delta.shape == residual.shape
        assert delta.is_contiguous()
    out = torch.empty_like(residual)
    cpu_kernels(residual.dtype).add_rms_norm(
        residual.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        *residual.shape,
        torch.get_num_threads(),
    )
    return out


def silu_multiply(gate_up: Tensor) -> Tensor:
    """Gate and up projections side by side [T, 2 * I] to silu(gate) * up [T, I].

    Args:
        gate_up: float32 or bfloat16, contiguous.
    """
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape
    out = gate_up.new_empty((rows, width // 2))
    cpu_kernels(gate_up.dtype).silu_multiply(
        gate_up.data_ptr(), out.data_ptr(), rows, width // 2, torch.get_num_threads()
    )
    return out
