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
        kv_head = (head - HEADS) % KV_HEADS
        slot = (block * KV_HEADS + kv_head) * PAGE + position % PAGE
        pages = keys if head < HEADS + KV_HEADS else values
        place = pages + slot[None, :] * HEAD_DIM + dim[:, None]
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
        in_use = (page >= lowest // PAGE) & (page <= highest // PAGE)
        block = tl.load(block_table + page, mask=in_use, other=0).to(tl.int64)
        slot = (block * KV_HEADS + kv_head) * PAGE + token % PAGE
        place = slot[:, None] * HEAD_DIM + dim[None, :]
        # What is not seen may hold anything, not-a-number too, which no weight of 0 would undo.
        read = ((token >= lowest) & (token <= highest))[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.trans(tl.load(keys + place, mask=read, other=0.0))
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
        value = tl.load(values + place, mask=read, other=0.0)
        weighted = dot(weights.to(value.dtype), value, weighted * correction[:, None])
    return weighted, largest, weight_sum


@triton.jit
def _lowest_seen(position: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """The first token that the one at `position` sees."""
    lowest = position * 0
    if WINDOW > 0:
        lowest = tl.maximum(position + 1 - WINDOW, 0)
    return lowest


@triton.jit
def _split(
    first: tl.tensor, end: tl.tensor, MIN_TILES: tl.constexpr, MAX_SPLITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """How tiles of tokens are shared out: tiles of a split, splits.

    By nothing but the sequence itself, for its result to be the same in every batch.
    """
    tiles = tl.maximum(tl.cdiv(end - first, MAX_SPLITS), MIN_TILES)
    return tiles, tl.cdiv(end - first, tiles)


@triton.jit
def _seen_by_one(
    position: tl.tensor, WINDOW: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """First and end tile of what a sequence's only row sees."""
    return _lowest_seen(position, WINDOW) // N, position // N + 1


@triton.jit
def _seen_by_many(
    context: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First and last token that a tile of a sequence's rows sees."""
    highest = context + tl.minimum(first_row + TILE_ROWS, rows) - 1
    return _lowest_seen(context + first_row, WINDOW), highest


@triton.jit
def _split_of_many(
    lowest: tl.tensor,
    highest: tl.tensor,
    rows: tl.tensor,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """As `_split`, of a tile of rows: those of long prompts are enough for the whole GPU."""
    first, end = lowest // N, highest // N + 1
    tiles, splits = _split(first, end, MIN_TILES, MAX_SPLITS)
    whole = rows > SPLIT_ROWS
    return tl.where(whole, end - first, tiles), tl.where(whole, 1, splits)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def attend_many(
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
    sequences: tl.tensor,
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
    SPLIT_ROWS: tl.constexpr,
) -> None:
    """Attention of the sequences with several rows. Grid: (tiles of rows, kv heads, split_bound).

    A tile holds all query heads of a kv head for as many rows as fit into M. Writes `out` where one
    split does it all; otherwise, for `combine_many`, each split's `partial`
    [rows, H, split_bound, D], `largest_scores` and `weight_sums` [rows, H, split_bound], all
    float32.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILE_ROWS: tl.constexpr = M // GROUP
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # The last rows of a sequence have most to do, so they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = _sequence_of_tile(starts, sequences, tile, TILE_ROWS)
    start = tl.load(starts + sequence)
    sequence_rows = tl.load(starts + sequence + 1) - start
    first_row = (tile - _first_tile(start, sequence, TILE_ROWS)) * TILE_ROWS
    if (sequence_rows == 1) | (first_row >= sequence_rows):
        return
    context = tl.load(contexts + sequence)
    lowest, highest = _seen_by_many(context, first_row, sequence_rows, WINDOW, TILE_ROWS)
    tiles, splits = _split_of_many(
        lowest, highest, sequence_rows, N, MIN_TILES, MAX_SPLITS, SPLIT_ROWS
    )
    if split >= splits:
        return

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
    begin = lowest // N + split * tiles
    weighted, largest, weight_sum = _attend_to_tiles(
        queries,
        context + row,
        keys,
        values,
        block_tables + sequence.to(tl.int64) * table_width,
        kv_head,
        begin,
        tl.minimum(begin + tiles, highest // N + 1),
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
    if splits == 1:
        tl.store(
            out + (flat_row * (HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + dim[None, :],
            (weighted / weight_sum[:, None]).to(out.dtype.element_ty),
            mask=mask,
        )
    else:
        place = (flat_row * HEADS + head) * split_bound + split
        tl.store(partial + (place * HEAD_DIM)[:, None] + dim[None, :], weighted, mask=mask)
        tl.store(largest_scores + place, largest, mask=used)
        tl.store(weight_sums + place, weight_sum, mask=used)


@triton.jit
def _find_work(
    starts: tl.tensor,
    contexts: tl.tensor,
    sequences: tl.tensor,
    item: tl.tensor,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The splits of all sequences with one row stand in a list, one sequence's after another's.

    Returns:
        Of an item of the list: its sequence, its split there. How long the list is.
    """
    sequence = item * 0
    before = item * 0
    total = item * 0
    for begin in tl.range(0, sequences, STARTS, num_stages=1):
        each = begin + tl.arange(0, STARTS)
        there = each < sequences
        start = tl.load(starts + each, mask=there, other=0)
        rows = tl.load(starts + each + 1, mask=there, other=0) - start
        position = tl.load(contexts + each, mask=there, other=0)
        first, end = _seen_by_one(position, WINDOW, N)
        _, splits = _split(first, end, MIN_TILES, MAX_SPLITS)
        splits = tl.where(rows == 1, splits, 0)
        ends = total + tl.cumsum(splits, axis=0)
        passed = there & (ends <= item)
        sequence += tl.sum(passed.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), axis=0))
        total += tl.sum(splits, axis=0)
    return sequence, item - before, total


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
    sequences: tl.tensor,
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
    """Attention of the sequences with one row. Grid: (programs, kv heads), as many as the GPU has
    use for: they take the splits of all sequences in turn, so none is launched for nothing.

    Writes `out` where one split does it all; otherwise, for `combine_one`, each split's `partial`
    [S, H, split_bound, D], `largest_scores` and `weight_sums` [S, H, split_bound], all float32.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    of_group = tl.arange(0, M)
    used = of_group < GROUP
    head = kv_head * GROUP + of_group
    dim = tl.arange(0, PADDED_DIM)
    mask = used[:, None] & (dim < HEAD_DIM)[None, :]
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    item = tl.program_id(0)
    sequence, split, total = _find_work(
        starts, contexts, sequences, item, WINDOW, N, MIN_TILES, MAX_SPLITS
    )
    while item < total:
        position = tl.load(contexts + sequence)
        first, end = _seen_by_one(position, WINDOW, N)
        tiles, splits = _split(first, end, MIN_TILES, MAX_SPLITS)
        flat_row = tl.load(starts + sequence).to(tl.int64)
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
        item += tl.num_programs(0)
        sequence, split, total = _find_work(
            starts, contexts, sequences, item, WINDOW, N, MIN_TILES, MAX_SPLITS
        )


@triton.jit
def _combine(
    partial: tl.tensor,
    largest_scores: tl.tensor,
    weight_sums: tl.tensor,
    out: tl.tensor,
    place: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
) -> None:
    """Adds up what the splits from `place` on have left of a row's head, to `out` [D]."""
    split = tl.arange(0, PADDED_SPLITS)
    dim = tl.arange(0, PADDED_DIM)
    used = split < splits
    largest = tl.load(largest_scores + place + split, mask=used, other=float("-inf"))
    weight_sum = tl.load(weight_sums + place + split, mask=used, other=0.0)
    weighted = tl.load(
        partial + ((place + split) * HEAD_DIM)[:, None] + dim[None, :],
        mask=used[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    correction = tl.exp2(largest - tl.max(largest, axis=0))
    weighted_sum = tl.sum(weighted * correction[:, None], axis=0)
    tl.store(
        out + dim,
        (weighted_sum / tl.sum(weight_sum * correction, axis=0)).to(out.dtype.element_ty),
        mask=dim < HEAD_DIM,
    )


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def combine_one(
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
    first, end = _seen_by_one(tl.load(contexts + sequence), WINDOW, N)
    _, splits = _split(first, end, MIN_TILES, MAX_SPLITS)
    if (tl.load(starts + sequence + 1) - start != 1) | (splits == 1):
        return
    _combine(
        partial,
        largest_scores,
        weight_sums,
        out + (start.to(tl.int64) * HEADS + head) * HEAD_DIM,
        (sequence.to(tl.int64) * HEADS + head) * split_bound,
        splits,
        HEAD_DIM,
        PADDED_DIM,
        MAX_SPLITS,
    )


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PLACED_ANYWHERE)
def combine_many(
    partial: tl.tensor,
    largest_scores: tl.tensor,
    weight_sums: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    out: tl.tensor,
    sequences: tl.tensor,
    split_bound: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
) -> None:
    """Adds up what `attend_many` left of rows with several splits. Grid: (rows, heads)."""
    flat_row = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.sum(_sequence_of_rows(starts, sequences, flat_row + tl.arange(0, 1)), axis=0)
    start = tl.load(starts + sequence)
    rows = tl.load(starts + sequence + 1) - start
    first_row = (flat_row - start) // TILE_ROWS * TILE_ROWS
    context = tl.load(contexts + sequence)
    lowest, highest = _seen_by_many(context, first_row, rows, WINDOW, TILE_ROWS)
    _, splits = _split_of_many(lowest, highest, rows, N, MIN_TILES, MAX_SPLITS, SPLIT_ROWS)
    if (rows == 1) | (splits == 1):
        return
    place = flat_row.to(tl.int64) * HEADS + head
    _combine(
        partial,
        largest_scores,
        weight_sums,
        out + place * HEAD_DIM,
        place * split_bound,
        splits,
        HEAD_DIM,
        PADDED_DIM,
        MAX_SPLITS,
    )
