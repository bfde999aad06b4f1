"""Paged attention and the small layers around it, on a GPU: launches `attention_kernels.py`.

Nothing here waits for the GPU or looks at what a tensor holds: grids follow from shapes alone, so a
step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_triton.kernels.base import BLOCK_TOKENS, AttentionGeometry, Rows

try:
    from llava_triton.kernels.gpu import attention_kernels, row_kernels
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ModuleNotFoundError(
        "answering on a GPU needs the Triton language, the Python package 'triton', and it is not "
        "installed. torch built for CUDA brings it along; reinstall torch, or the version of "
        "triton that its metadata asks for",
        name="triton",
    ) from error

MAX_SPLITS = 32
"""Programs that share one sequence's keys and values, in decoding."""
MIN_SPLIT_TOKENS = 128
"""A program's share is not less, short of the sequence."""
_SILU_COLUMNS = 1024
_INT8_OUTPUTS, _INT8_INPUTS = 16, 256


@dataclass(frozen=True)
class _Tiles:
    """How the attention kernels cut their work, by dtype and head size."""

    one_queries: int
    """Queries of a program of `attend_one`: at least the query heads of a kv head."""
    many_queries: int
    """Likewise of `attend_many`."""
    tokens: int
    """Keys and values taken at a time; a multiple of BLOCK_TOKENS."""

    @staticmethod
    def of(geometry: AttentionGeometry, dtype: torch.dtype) -> _Tiles:
        group = _power_of_two(geometry.heads // geometry.kv_heads)
        # float32 is exact here (no TF32), which goes through registers, without tensor cores.
        exact = dtype == torch.float32
        tokens = (2048 if exact else 8192) // _power_of_two(geometry.head_dim)
        return _Tiles(
            one_queries=max(16, group),
            many_queries=max(16 if exact else 64, group),
            tokens=min(64, max(BLOCK_TOKENS, tokens)),
        )

    @property
    def min_split(self) -> int:
        """Tiles of tokens that a split has at least."""
        return MIN_SPLIT_TOKENS // self.tokens


class GpuAttention:
    """Implements `PagedAttention` for float32, float16 and bfloat16, with sums in float32.

    A sequence's result is the same to the last bit whatever else is in the batch.
    """

    def __init__(self, geometry: AttentionGeometry) -> None:
        self._geometry = geometry
        self._scale = geometry.scale / math.log(2)  # weights are powers of two
        self._padded_dim = _power_of_two(geometry.head_dim)

    def rotate_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Rows
    ) -> None:
        """See `PagedAttention.rotate_and_store`."""
        self._check(qkv, keys, values, rows)
        assert cos.dtype == sin.dtype == torch.float32
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        geometry = self._geometry
        sequences, table_width = rows.block_tables.shape
        grid = (
            _ceil_div(len(qkv), attention_kernels.ROTATED_ROWS.value),
            geometry.heads + 2 * geometry.kv_heads,
        )
        with torch.cuda.device_of(qkv):
            attention_kernels.rotate_and_store[grid](
                qkv,
                cos,
                sin,
                keys,
                values,
                rows.starts,
                rows.block_tables,
                rows.positions,
                len(qkv),
                sequences,
                table_width,
                HEADS=geometry.heads,
                KV_HEADS=geometry.kv_heads,
                HEAD_DIM=geometry.head_dim,
                PADDED_HALF=_power_of_two(geometry.head_dim // 2),
            )

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """See `PagedAttention.attend`."""
        self._check(qkv, keys, values, rows)
        geometry = self._geometry
        out = qkv.new_empty((len(qkv), geometry.heads * geometry.head_dim))
        tiles = _Tiles.of(geometry, qkv.dtype)
        sequences = len(rows.contexts)
        with torch.cuda.device_of(qkv):
            # Every sequence has a row: with as many rows as sequences, each has one, and only a
            # single sequence is known to have several. Otherwise each kernel takes its own.
            if len(qkv) == sequences or sequences > 1:
                self._attend_one(qkv, keys, values, rows, out, tiles)
            if len(qkv) > sequences:
                self._attend_many(qkv, keys, values, rows, out, tiles)
        return out

    def _attend_many(
        self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows, out: Tensor, tiles: _Tiles
    ) -> None:
        """Fill in the rows of the sequences that have several."""
        geometry = self._geometry
        sequences, table_width = rows.block_tables.shape
        tile_rows = tiles.many_queries // (geometry.heads // geometry.kv_heads)
        attention_kernels.attend_many[(len(qkv) // tile_rows + sequences, geometry.kv_heads)](
            qkv,
            keys,
            values,
            rows.starts,
            rows.contexts,
            rows.block_tables,
            out,
            sequences,
            table_width,
            self._scale,
            HEADS=geometry.heads,
            KV_HEADS=geometry.kv_heads,
            HEAD_DIM=geometry.head_dim,
            PADDED_DIM=max(16, self._padded_dim),
            WINDOW=geometry.window or 0,
            M=tiles.many_queries,
            N=tiles.tokens,
            num_warps=_warps(tiles.many_queries * self._padded_dim),
        )

    def _attend_one(
        self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows, out: Tensor, tiles: _Tiles
    ) -> None:
        """Fill in the rows of the sequences that have a single one."""
        geometry = self._geometry
        sequences, table_width = rows.block_tables.shape
        splits = self._split_bound(table_width, tiles)
        # Nothing is kept there when one split is enough for everything.
        kept = (sequences, geometry.heads, splits) if splits > 1 else (0, 0, 0)
        partial = qkv.new_empty((*kept, geometry.head_dim), dtype=torch.float32)
        largest_scores = qkv.new_empty(kept, dtype=torch.float32)
        weight_sums = torch.empty_like(largest_scores)
        attention_kernels.attend_one[(sequences, geometry.kv_heads, splits)](
            qkv,
            keys,
            values,
            rows.starts,
            rows.contexts,
            rows.block_tables,
            out,
            partial,
            largest_scores,
            weight_sums,
            table_width,
            splits,
            self._scale,
            HEADS=geometry.heads,
            KV_HEADS=geometry.kv_heads,
            HEAD_DIM=geometry.head_dim,
            PADDED_DIM=max(16, self._padded_dim),
            WINDOW=geometry.window or 0,
            M=tiles.one_queries,
            N=tiles.tokens,
            MIN_TILES=tiles.min_split,
            MAX_SPLITS=MAX_SPLITS,
            num_warps=_warps(tiles.one_queries * self._padded_dim),
            # Loads two tiles ahead: one for the block table, and two each for keys and values.
            num_stages=5,
        )
        if splits == 1:
            return
        attention_kernels.combine[(sequences, geometry.heads)](
            partial,
            largest_scores,
            weight_sums,
            rows.starts,
            rows.contexts,
            out,
            splits,
            HEADS=geometry.heads,
            HEAD_DIM=geometry.head_dim,
            PADDED_DIM=self._padded_dim,
            WINDOW=geometry.window or 0,
            N=tiles.tokens,
            MIN_TILES=tiles.min_split,
            MAX_SPLITS=MAX_SPLITS,
        )

    def _split_bound(self, table_width: int, tiles: _Tiles) -> int:
        """At least the splits of any sequence whose blocks fit the tables."""
        count = _ceil_div(table_width * BLOCK_TOKENS, tiles.tokens)
        if self._geometry.window is not None:
            # Its first token may be the last one of a tile.
            count = min(count, _ceil_div(self._geometry.window - 1, tiles.tokens) + 1)
        return min(MAX_SPLITS, _ceil_div(count, tiles.min_split))

    def _check(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> None:
        """What would otherwise read or write past a tensor."""
        geometry = self._geometry
        assert qkv.dtype == keys.dtype == values.dtype
        assert all(tensor.is_contiguous() for tensor in (qkv, keys, values))
        assert qkv.shape[1] == geometry.qkv_width
        assert keys.shape[1:] == (geometry.kv_heads, geometry.head_dim, BLOCK_TOKENS)
        assert values.shape[1:] == (geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
        assert rows.starts.dtype == rows.contexts.dtype == rows.block_tables.dtype == torch.int32
        assert rows.positions.dtype == torch.int64
        assert rows.block_tables.is_contiguous()


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `residual` in place, then normalize, as transformers' `LlamaRMSNorm` does.

    Args:
        residual: float32, float16 or bfloat16 [T, W], contiguous, as are the others.
        delta: [T, W]; None adds nothing.
        weight: [W].
        eps: added to the mean square.

    Returns:
        [T, W], residual / root mean square * weight.
    """
    rows, width = residual.shape
    assert residual.dtype == weight.dtype
    assert weight.shape == (width,)
    assert all(tensor.is_contiguous() for tensor in (residual, weight))
    if delta is not None:
        assert delta.dtype == residual.dtype
        assert delta.shape == residual.shape
        assert delta.is_contiguous()
    out = torch.empty_like(residual)
    with torch.cuda.device_of(residual):
        row_kernels.add_rms_norm[(rows,)](
            residual,
            residual if delta is None else delta,
            weight,
            out,
            eps,
            ADD=delta is not None,
            WIDTH=width,
            PADDED_WIDTH=_power_of_two(width),
            num_warps=_warps(2 * width),
        )
    return out


def silu_multiply(gate_up: Tensor) -> Tensor:
    """Gate and up projections side by side [T, 2 * I] to silu(gate) * up [T, I].

    Args:
        gate_up: float32, float16 or bfloat16, contiguous.
    """
    assert gate_up.is_contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    with torch.cuda.device_of(gate_up):
        row_kernels.silu_multiply[(rows, _ceil_div(width, _SILU_COLUMNS))](
            gate_up, out, WIDTH=width, COLUMNS=_SILU_COLUMNS
        )
    return out


INT8_ROWS = 256
"""Rows that `int8_product` takes: those of decode steps. For a prompt's, a library's product of the
weights as floats is faster."""


def int8_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (scales W)^T + b, which reads half of what W in a half type would be.

    Args:
        x: float32, float16 or bfloat16 [T, inputs], 1 <= T <= INT8_ROWS, contiguous, as are the
            others.
        weight: int8 [outputs, inputs].
        scales: float32 [outputs]: a row of W is its integers times its scale.
        bias: [outputs].

    Returns:
        [T, outputs], summed in float32.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    assert 1 <= rows <= INT8_ROWS
    assert weight.shape == (len(scales), inputs)
    assert weight.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales))
    out = x.new_empty((rows, outputs))
    with torch.cuda.device_of(x):
        tile = min(64, max(16, _power_of_two(rows)))
        # Programs side by side share their weights, so that all but one find them in the cache.
        row_kernels.int8_product[(_ceil_div(rows, tile), _ceil_div(outputs, _INT8_OUTPUTS))](
            x,
            weight,
            scales,
            scales if bias is None else bias,
            out,
            rows,
            BIAS=bias is not None,
            INPUTS=inputs,
            OUTPUTS=outputs,
            M=tile,
            N=_INT8_OUTPUTS,
            K=_INT8_INPUTS,
            num_warps=4,
            num_stages=4,
        )
    return out


def _power_of_two(number: int) -> int:
    """The least one that is not less."""
    return 1 << (number - 1).bit_length()


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _warps(elements: int) -> int:
    """Groups of 32 threads for a program whose accumulator has so many elements."""
    return 8 if elements > 8192 else 4
