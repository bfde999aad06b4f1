"""Paged attention and the small layers around it, on a GPU: launches `attention_kernels.py`.

Nothing here waits for the GPU or looks at what a tensor holds: grids follow from shapes alone, so a
step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_triton.kernels.base import BLOCK_TOKENS, AttentionGeometry, Rows
from llava_triton.kernels.gpu.parameters import Parameters, parameters

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
MULTIPROCESSORS_OF_NONE = 1
"""Where Triton's interpreter is the device: few programs do all the work, so that the tests see
them go from one piece to the next."""
_SILU_COLUMNS = 1024


@dataclass(frozen=True)
class Tiles:
    """How the attention kernels cut their work, by dtype and head size."""

    one_queries: int
    """Queries of a program of `attend_one`: at least the query heads of a kv head."""
    many_queries: int
    """Likewise of `attend_many`."""
    one_tokens: int
    """Keys and values that a program of `attend_one` takes at a time; a multiple of BLOCK_TOKENS.
    """
    many_tokens: int
    """Likewise of `attend_many`: twice as many would not fit an A10G's registers."""

    @staticmethod
    def of(geometry: AttentionGeometry, dtype: torch.dtype) -> Tiles:
        """For a model's attention, computed in a type."""
        group = _power_of_two(geometry.heads // geometry.kv_heads)
        # float32 is exact here (no TF32), which goes through registers, without tensor cores.
        exact = dtype == torch.float32
        tokens = (2048 if exact else 8192) // _power_of_two(geometry.head_dim)
        return Tiles(
            one_queries=max(16, group),
            many_queries=max(16 if exact else 64, group),
            one_tokens=min(64, max(BLOCK_TOKENS, tokens)),
            many_tokens=min(64, max(BLOCK_TOKENS, tokens // 2)),
        )


class GpuAttention:
    """Implements `PagedAttention` for float32, float16 and bfloat16, with sums in float32.

    A sequence's result is the same to the last bit whatever else is in the batch.
    """

    def __init__(self, geometry: AttentionGeometry, chosen: Parameters | None = None) -> None:
        self._geometry = geometry
        self._scale = geometry.scale / math.log(2)  # weights are powers of two
        self._padded_dim = _power_of_two(geometry.head_dim)
        self._chosen = chosen or parameters()

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
        tiles = Tiles.of(geometry, qkv.dtype)
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
        self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows, out: Tensor, tiles: Tiles
    ) -> None:
        """Fill in the rows of the sequences that have several."""
        geometry, chosen = self._geometry, self._chosen
        sequences, table_width = rows.block_tables.shape
        tile_rows = tiles.many_queries // (geometry.heads // geometry.kv_heads)
        splits = self._split_bound(table_width, tiles.many_tokens, chosen.prompt_splits, tile_rows)
        if sequences == 1 and len(qkv) > chosen.prompt_split_rows:
            splits = 1  # else the longest prompt is not known
        partial, largest_scores, weight_sums = self._kept(qkv, len(qkv), splits)
        cut = {
            "N": tiles.many_tokens,
            "MIN_TILES": chosen.min_split_tokens // tiles.many_tokens,
            "MAX_SPLITS": chosen.prompt_splits,
            "SPLIT_ROWS": chosen.prompt_split_rows,
            "WINDOW": geometry.window or 0,
        }
        row_tiles = len(qkv) // tile_rows + sequences
        attention_kernels.attend_many[(row_tiles, geometry.kv_heads, splits)](
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
            sequences,
            table_width,
            splits,
            self._scale,
            HEADS=geometry.heads,
            KV_HEADS=geometry.kv_heads,
            HEAD_DIM=geometry.head_dim,
            PADDED_DIM=max(16, self._padded_dim),
            M=tiles.many_queries,
            **cut,
            num_warps=warps(tiles.many_queries * self._padded_dim),
        )
        if splits > 1:
            attention_kernels.combine_many[(len(qkv), geometry.heads)](
                partial,
                largest_scores,
                weight_sums,
                rows.starts,
                rows.contexts,
                out,
                sequences,
                splits,
                HEADS=geometry.heads,
                HEAD_DIM=geometry.head_dim,
                PADDED_DIM=self._padded_dim,
                TILE_ROWS=tile_rows,
                **cut,
            )

    def _attend_one(
        self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows, out: Tensor, tiles: Tiles
    ) -> None:
        """Fill in the rows of the sequences that have a single one."""
        geometry, chosen = self._geometry, self._chosen
        sequences, table_width = rows.block_tables.shape
        splits = self._split_bound(table_width, tiles.one_tokens, MAX_SPLITS, 1)
        partial, largest_scores, weight_sums = self._kept(qkv, sequences, splits)
        cut = {
            "N": tiles.one_tokens,
            "MIN_TILES": chosen.min_split_tokens // tiles.one_tokens,
            "MAX_SPLITS": MAX_SPLITS,
            "WINDOW": geometry.window or 0,
        }
        useful = chosen.decode_programs * _multiprocessors(qkv.device)
        programs = min(sequences * splits, _ceil_div(useful, geometry.kv_heads))
        attention_kernels.attend_one[(programs, geometry.kv_heads)](
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
            sequences,
            table_width,
            splits,
            self._scale,
            HEADS=geometry.heads,
            KV_HEADS=geometry.kv_heads,
            HEAD_DIM=geometry.head_dim,
            PADDED_DIM=max(16, self._padded_dim),
            M=tiles.one_queries,
            **cut,
            num_warps=warps(tiles.one_queries * self._padded_dim),
            num_stages=chosen.decode_stages,
        )
        if splits > 1:
            attention_kernels.combine_one[(sequences, geometry.heads)](
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
                **cut,
            )

    def _kept(self, like: Tensor, rows: int, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where splits leave sums, largest scores and weights; nothing is left by a single one."""
        kept = (rows, self._geometry.heads, splits) if splits > 1 else (0, 0, 0)
        partial = like.new_empty((*kept, self._geometry.head_dim), dtype=torch.float32)
        largest_scores = like.new_empty(kept, dtype=torch.float32)
        return partial, largest_scores, torch.empty_like(largest_scores)

    def _split_bound(self, table_width: int, tokens: int, most: int, rows: int) -> int:
        """At least the splits of any tile of so many rows, where so many tokens are taken at a
        time."""
        count = _ceil_div(table_width * BLOCK_TOKENS, tokens)
        if self._geometry.window is not None:
            # Its first token may be the last one of a tile.
            seen = self._geometry.window + rows - 1
            count = min(count, _ceil_div(seen - 1, tokens) + 1)
        return min(most, _ceil_div(count, self._chosen.min_split_tokens // tokens))

    def _check(self, qkv: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> None:
        """What would otherwise read or write past a tensor."""
        geometry = self._geometry
        assert qkv.dtype == keys.dtype == values.dtype
        assert all(tensor.is_contiguous() for tensor in (qkv, keys, values))
        assert qkv.shape[1] == geometry.qkv_width
        assert keys.shape[1:] == (geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
        assert values.shape == keys.shape
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
            num_warps=warps(2 * width),
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


@dataclass(frozen=True)
class Int8Tile:
    """How `int8_product` cuts its work: rows, outputs and inputs of a program."""

    rows: int
    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 4

    @staticmethod
    def of(rows: int, dtype: torch.dtype) -> Int8Tile:
        """For so many rows. A tile of x and one of weights wait in shared memory for each stage but
        one: at most 99 KiB of them are there on an A10G or an L4."""
        if dtype == torch.float32:  # exact products, without tensor cores, in registers
            return Int8Tile(16, 16, 64) if rows <= 16 else Int8Tile(32, 32, 32)
        if rows <= 32:
            # Few outputs, so that there are enough programs to keep the whole memory busy.
            return Int8Tile(16 if rows <= 16 else 32, 16, 256)
        if rows <= 64:
            return Int8Tile(64, 16, 256, stages=3)
        if rows <= 256:
            return Int8Tile(64, 64, 128, stages=3)
        return Int8Tile(128, 128, 64, warps=8, stages=3)


def int8_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (scales W)^T + b, which reads half of what W in a half type would be.

    Args:
        x: float32, float16 or bfloat16 [T, inputs], contiguous, as are the others.
        weight: int8 [outputs, inputs].
        scales: float32 [outputs]: a row of W is its integers times its scale.
        bias: [outputs].

    Returns:
        [T, outputs], summed in float32.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    assert weight.shape == (len(scales), inputs)
    assert weight.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, weight, scales))
    out = x.new_empty((rows, outputs))
    tile = Int8Tile.of(rows, x.dtype)
    with torch.cuda.device_of(x):
        # Programs side by side share their weights, so that all but one find them in the cache.
        row_kernels.int8_product[(_ceil_div(rows, tile.rows), _ceil_div(outputs, tile.outputs))](
            x,
            weight,
            scales,
            scales if bias is None else bias,
            out,
            rows,
            BIAS=bias is not None,
            INPUTS=inputs,
            OUTPUTS=outputs,
            M=tile.rows,
            N=tile.outputs,
            K=tile.inputs,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS_OF_NONE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(number: int) -> int:
    """The least one that is not less."""
    return 1 << (number - 1).bit_length()


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def warps(elements: int) -> int:
    """Groups of 32 threads for a program whose accumulator has so many elements."""
    return 8 if elements > 8192 else 4
