"""Paged attention on a GPU, in the Triton language; `attention.py` launches it.

Names as in `base.py`; what a kernel is compiled for is in capitals. Tensors are contiguous.
Nothing about the batch but its shapes is known to the host, so programs find their sequence
themselves, and those without work end at once.
"""

# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803, N806

from __future__ import annotations

import triton
import triton.language as tl

from llava_triton.kernels.base import BLOCK_TOKENS

PAGE = tl.constexpr(BLOCK_TOKENS)
STARTS = tl.constexpr(128)
"""Entries of `starts` looked at together."""
ROTATED_ROWS = tl.constexpr(16)
"""Rows of a program of `rotate_and_store`."""
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# What differs from step to step. Triton would compile anew, amid answers, for numbers that are 1 or
# divide by 16, and for tensors that begin elsewhere than at a multiple of 16 bytes.
VARYING = ("rows", "sequences", "table_width", "split_bound")
PLACED_ANYWHERE = ("starts", "contexts", "block_tables", "positions")


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """a @ b + accumulator, in float32."""
    if INTERPRETED:  # it takes the bits of bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _sequence_of_rows(starts: tl.tensor, sequences: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The sequence each row [N] belongs to: the last one that starts at it or before."""
    found = row * 0 - 1
    for begin in range(0, sequences, STARTS):
        sequence = begin + tl.arange(0, STARTS)
        start = tl.load(starts + sequence, mask=sequence < sequences, other=2**31 - 1)
        found += tl.sum((start[None, :] <= row[:, None]).to(tl.int32), axis=1)
    return found


@triton.jit
def _sequence_of_tile(
    starts: tl.tensor, sequences: tl.tensor, tile: tl.tensor, TILE_ROWS: tl.constexpr
) -> tl.tensor:
    """The sequence a tile belongs to, where sequence s has the tiles from `_first_tile(s)` on."""
    found = tile * 0 - 1
    for begin in range(0, sequences, STARTS):
        sequence = begin + tl.arange(0, STARTS)
        start = tl.load(starts + sequence, mask=sequence < sequences, other=0)
        before = (_first_tile(start, sequence, TILE_ROWS) <= tile) & (sequence < sequences)
        found += tl.sum(before.to(tl.int32), axis=0)
    return found


@triton.jit
def _first_tile(start: tl.tensor, sequence: tl.tensor, TILE_ROWS: tl.constexpr) -> tl.tensor:
    """Leaves every sequence at least the tiles it needs, and needs no sum over those before it."""
    return start // TILE_ROWS + sequence


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def rotate_and_store(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    starts: tl.tensor,
    block_tables: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    sequences: tl.tensor,
    table_width: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> None:
    """See `PagedAttention`. Grid: (tiles of ROTATED_ROWS rows, columns of heads in `qkv`)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROTATED_ROWS + tl.arange(0, ROTATED_ROWS)
    HALF: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, PADDED_HALF)
    mask = (dim < HALF)[:, None] & (row < rows)[None, :]  # tiles are [D / 2, rows]
    position = tl.load(positions + row, mask=row < rows, other=0)
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first_half = qkv + row.to(tl.int64)[None, :] * width + head * HEAD_DIM + dim[:, None]
    x1 = tl.load(first_half, mask=mask, other=0.0)
    x2 = tl.load(first_half + HALF, mask=mask, other=0.0)
    if head < HEADS + KV_HEADS:
        angle = position[None, :] * HALF + dim[:, None]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        a, b = x1.to(tl.float32), x2.to(tl.float32)
        x1 = (a * c - b * s).to(qkv.dtype.element_ty)
        x2 = (b * c + a * s).to(qkv.dtype.element_ty)
    if head < HEADS:
        tl.store(first_half, x1, mask=mask)
        tl.store(first_half + HALF, x2, mask=mask)
    else:
        sequence = _sequence_of_rows(starts, sequences, row).to(tl.int64)
        entry = block_tables + sequence * table_width + position // PAGE
        block = tl.load(entry, mask=row < rows, other=0).to(tl.int64)
        slot = (position % PAGE)[None, :]
        kv_head = (head - HEADS) % KV_HEADS
        page = (block * KV_HEADS + kv_head)[None, :] * (HEAD_DIM * PAGE)
        if head < HEADS + KV_HEADS:
            place = keys + page + dim[:, None] * PAGE + slot
            tl.store(place, x1, mask=mask)
            tl.store(place + HALF * PAGE, x2, mask=mask)
        else:
            place = values + page + slot * HEAD_DIM + dim[:, None]
            tl.store(place, x1, mask=mask)
            tl.store(place + HALF, x2, mask=mask)


@triton.jit
def _attend_to_tiles(
    queries: tl.tensor,
    positions: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_table: tl.tensor,
    kv_head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Flash attention of queries [M, D] at `positions` [M] to tiles `begin` to `end` of N tokens.

    Only tokens `lowest` to `highest` are read: each is seen by some query.

    Returns:
        Sum of the values [M, D], weighted with 2^(score - largest); largest score [M]; sum of the
        weights [M]. Scores are in units of log 2, as `scale` is.
    """
    dim = tl.arange(0, PADDED_DIM)
    largest = tl.full([M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([M], tl.float32)
    weighted = tl.zeros([M, PADDED_DIM], tl.float32)
    for tile in range(begin, end):
        token = tile * N + tl.arange(0, N)
        page = token // PAGE
        # A key's slots are side by side, so its page is read whole: masks by token would make
        # every load a single element's. What its unused slots hold is masked in the scores.
        in_use = (page >= lowest // PAGE) & (page <= highest // PAGE)
        block = tl.load(block_table + page, mask=in_use, other=0).to(tl.int64)
        page_offset = (block * KV_HEADS + kv_head) * (HEAD_DIM * PAGE)
        key = tl.load(
            keys + (page_offset[None, :] + dim[:, None] * PAGE + (token % PAGE)[None, :]),
            mask=in_use[None, :] & (dim < HEAD_DIM)[:, None],
            other=0.0,
        )
        scores = dot(queries, key, tl.zeros([M, N], tl.float32)) * scale
        distance = positions[:, None] - token[None, :]
        seen = distance >= 0
        if WINDOW > 0:
            seen &= distance < WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # A query that has seen nothing yet must not compute infinity - infinity.
        reference = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(scores - reference[:, None])
        correction = tl.exp2(largest - reference)
        largest = now_largest
        weight_sum = weight_sum * correction + tl.sum(weights, axis=1)
        value = tl.load(
            values + (page_offset + (token % PAGE) * HEAD_DIM)[:, None] + dim[None, :],
            mask=((token >= lowest) & (token <= highest))[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        weighted = dot(weights.to(value.dtype), value, weighted * correction[:, None])
    return weighted, largest, weight_sum


@triton.jit
def _lowest_seen(position: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """The first token that the one at `position` sees."""
    lowest = position * 0
    if WINDOW > 0:
        lowest = tl.maximum(position + 1 - WINDOW, 0)
    return lowest


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def attend_many(
    qkv: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    block_tables: tl.tensor,
    out: tl.tensor,
    sequences: tl.tensor,
    table_width: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Attention of the sequences with several rows. Grid: (tiles of rows, kv heads).

    A tile holds all query heads of a kv head for as many rows as fit into M.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILE_ROWS: tl.constexpr = M // GROUP
    kv_head = tl.program_id(1)
    # The last rows of a sequence have most to do, so they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = _sequence_of_tile(starts, sequences, tile, TILE_ROWS)
    start = tl.load(starts + sequence)
    sequence_rows = tl.load(starts + sequence + 1) - start
    first_row = (tile - _first_tile(start, sequence, TILE_ROWS)) * TILE_ROWS
    if (sequence_rows == 1) | (first_row >= sequence_rows):
        return

    context = tl.load(contexts + sequence)
    of_tile = tl.arange(0, M)
    row = first_row + of_tile // GROUP
    head = kv_head * GROUP + of_tile % GROUP
    dim = tl.arange(0, PADDED_DIM)
    used = (row < sequence_rows) & (of_tile < TILE_ROWS * GROUP)
    mask = used[:, None] & (dim < HEAD_DIM)[None, :]
    flat_row = (start + row).to(tl.int64)
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    queries = tl.load(
        qkv + (flat_row * width + head * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0
    )
    lowest = _lowest_seen(context + first_row, WINDOW)
    highest = context + tl.minimum(first_row + TILE_ROWS, sequence_rows) - 1
    weighted, _, weight_sum = _attend_to_tiles(
        queries,
        context + row,
        keys,
        values,
        block_tables + sequence.to(tl.int64) * table_width,
        kv_head,
        lowest // N,
        highest // N + 1,
        lowest,
        highest,
        scale,
        KV_HEADS,
        HEAD_DIM,
        PADDED_DIM,
        WINDOW,
        M,
        N,
    )
    tl.store(
        out + (flat_row * (HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + dim[None, :],
        (weighted / weight_sum[:, None]).to(out.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _split(
    position: tl.tensor,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """How what a token sees is shared out: first tile, end tile, tiles of a split, splits.

    By nothing but the sequence itself, for its result to be the same in every batch.
    """
    first = _lowest_seen(position, WINDOW) // N
    end = position // N + 1
    tiles = tl.maximum(tl.cdiv(end - first, MAX_SPLITS), MIN_TILES)
    return first, end, tiles, tl.cdiv(end - first, tiles)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def attend_one(
    qkv: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    block_tables: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    largest_scores: tl.tensor,
    weight_sums: tl.tensor,
    table_width: tl.tensor,
    split_bound: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """Attention of the sequences with one row. Grid: (sequences, kv heads, split_bound).

    Writes `out` where one split does it all; otherwise, for `combine`, each split's `partial`
    [S, H, split_bound, D], `largest_scores` and `weight_sums` [S, H, split_bound], all float32.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(starts + sequence)
    position = tl.load(contexts + sequence)
    first, end, tiles, splits = _split(position, WINDOW, N, MIN_TILES, MAX_SPLITS)
    if (tl.load(starts + sequence + 1) - start != 1) | (split >= splits):
        return

    of_group = tl.arange(0, M)
    used = of_group < GROUP
    head = kv_head * GROUP + of_group
    dim = tl.arange(0, PADDED_DIM)
    mask = used[:, None] & (dim < HEAD_DIM)[None, :]
    flat_row = start.to(tl.int64)
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    queries = tl.load(
        qkv + flat_row * width + (head * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0
    )
    begin = first + split * tiles
    weighted, largest, weight_sum = _attend_to_tiles(
        queries,
        position + of_group * 0,
        keys,
        values,
        block_tables + sequence.to(tl.int64) * table_width,
        kv_head,
        begin,
        tl.minimum(begin + tiles, end),
        _lowest_seen(position, WINDOW),
        position,
        scale,
        KV_HEADS,
        HEAD_DIM,
        PADDED_DIM,
        WINDOW,
        M,
        N,
    )
    if splits == 1:
        tl.store(
            out + flat_row * (HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + dim[None, :],
            (weighted / weight_sum[:, None]).to(out.dtype.element_ty),
            mask=mask,
        )
    else:
        place = (sequence.to(tl.int64) * HEADS + head) * split_bound + split
        tl.store(partial + (place * HEAD_DIM)[:, None] + dim[None, :], weighted, mask=mask)
        tl.store(largest_scores + place, largest, mask=used)
        tl.store(weight_sums + place, weight_sum, mask=used)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def combine(
    partial: tl.tensor,
    largest_scores: tl.tensor,
    weight_sums: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    out: tl.tensor,
    split_bound: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """Adds up what `attend_one` left of sequences with several splits. Grid: (sequences, heads)."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    _, _, _, splits = _split(tl.load(contexts + sequence), WINDOW, N, MIN_TILES, MAX_SPLITS)
    if (tl.load(starts + sequence + 1) - start != 1) | (splits == 1):
        return

    split = tl.arange(0, MAX_SPLITS)
    dim = tl.arange(0, PADDED_DIM)
    used = split < splits
    place = (sequence.to(tl.int64) * HEADS + head) * split_bound + split
    largest = tl.load(largest_scores + place, mask=used, other=float("-inf"))
    weight_sum = tl.load(weight_sums + place, mask=used, other=0.0)
    weighted = tl.load(
        partial + (place * HEAD_DIM)[:, None] + dim[None, :],
        mask=used[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    correction = tl.exp2(largest - tl.max(largest, axis=0))
    weighted_sum = tl.sum(weighted * correction[:, None], axis=0)
    tl.store(
        out + start.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM + dim,
        (weighted_sum / tl.sum(weight_sum * correction, axis=0)).to(out.dtype.element_ty),
        mask=dim < HEAD_DIM,
    )
