"""Drawing tokens on a GPU, in the Triton language; launched by `sampling.py`.

A row is never sorted. Tokens stand in the order of their logits, likeliest first and equal ones by
their IDs; where a limit falls in that order is found digit by digit, by adding up what lies above
sixteen candidates at a time.
"""

# mypy: disallow-untyped-decorators=False
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(6)
"""Of a row of `draws`: row of the logits, 1 / temperature in units of log 2, top-k, top-p, log 2 of
the least probability beside the largest, the number drawn."""
CHUNK = tl.constexpr(1024)
"""Tokens looked at together."""
DIGITS = tl.constexpr(16)


@triton.jit
def _chunk(
    row: tl.tensor,
    first: tl.tensor,
    VOCABULARY: tl.constexpr,
    largest: tl.tensor,
    factor: tl.tensor,
    least: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A chunk of tokens from `first` on: their sort keys, their weights, which of them exist."""
    token = first + tl.arange(0, CHUNK)
    there = token < VOCABULARY
    logit = tl.load(row + token, mask=there, other=float("-inf")) + 0.0  # -0 is 0
    bits = logit.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    scaled = (logit - largest) * factor
    weight = tl.where(scaled < least, 0.0, tl.exp2(scaled))
    return key, weight, there


@triton.jit
def _counted(key: tl.tensor, weight: tl.tensor, lowest: tl.tensor, share: tl.tensor) -> tl.tensor:
    """Weights of the tokens that are left: all above the lowest key, and a share of those at it."""
    return tl.where(key > lowest, weight, tl.where(key == lowest, weight * share, 0.0))


@triton.jit
def _find(
    row: tl.tensor,
    VOCABULARY: tl.constexpr,
    largest: tl.tensor,
    factor: tl.tensor,
    least: tl.tensor,
    lowest: tl.tensor,
    share: tl.tensor,
    wanted: tl.tensor,
    COUNT: tl.constexpr,
    STRICT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The highest key at and above which there is as much as is wanted (STRICT: more).

    Args:
        wanted: a number of tokens (COUNT), or a share of all weights.

    Returns:
        The key; how much was wanted, as a number of tokens or as weights.
    """
    found = lowest * 0
    target = wanted
    for digit in range(8):
        shift = 28 - 4 * digit
        candidate = found + (tl.arange(0, DIGITS).to(tl.uint32) << shift)
        sums = tl.zeros([DIGITS], tl.float32)
        for first in range(0, VOCABULARY, CHUNK):
            key, weight, there = _chunk(row, first, VOCABULARY, largest, factor, least)
            each = _counted(key, weight, lowest, share)
            if COUNT:
                each = there.to(tl.float32)
            above = key[:, None] >= candidate[None, :]
            sums += tl.sum(tl.where(above, each[:, None], 0.0), axis=0)
        if not COUNT and digit == 0:  # everything lies above the first candidate
            target = wanted * tl.max(sums, axis=0)
        enough = sums > target if STRICT else sums >= target
        steps = tl.maximum(tl.sum(enough.to(tl.int32), axis=0) - 1, 0)
        found += steps.to(tl.uint32) << shift
    return found, target


@triton.jit
def _at(
    row: tl.tensor,
    VOCABULARY: tl.constexpr,
    largest: tl.tensor,
    factor: tl.tensor,
    least: tl.tensor,
    wanted: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """How many tokens lie above a key, and their weight; how many at it, and the weight of one."""
    above = largest * 0.0
    weights = largest * 0.0
    equal = largest * 0.0
    one = largest * 0.0
    for first in range(0, VOCABULARY, CHUNK):
        key, weight, there = _chunk(row, first, VOCABULARY, largest, factor, least)
        higher = there & (key > wanted)
        same = there & (key == wanted)
        above += tl.sum(higher.to(tl.float32), axis=0)
        weights += tl.sum(tl.where(higher, weight, 0.0), axis=0)
        equal += tl.sum(same.to(tl.float32), axis=0)
        one = tl.maximum(one, tl.max(tl.where(same, weight, 0.0), axis=0))
    return above, weights, equal, one


@triton.jit
def draw(
    logits: tl.tensor,
    largest_logits: tl.tensor,
    draws: tl.tensor,
    tokens: tl.tensor,
    VOCABULARY: tl.constexpr,
) -> None:
    """One program for each row of `draws`; see `sampling.py`."""
    of_draw = draws + tl.program_id(0) * FIELDS
    index = tl.load(of_draw).to(tl.int64)
    factor = tl.load(of_draw + 1)
    top_k = tl.load(of_draw + 2)
    top_p = tl.load(of_draw + 3)
    least = tl.load(of_draw + 4)
    number = tl.load(of_draw + 5)
    row = logits + index * VOCABULARY
    largest = tl.load(largest_logits + index)

    lowest = (index * 0).to(tl.uint32)
    share = largest * 0.0 + 1.0
    left = largest * 0.0 + VOCABULARY  # tokens at the lowest key that are left
    if top_k > 0.0:
        lowest, _ = _find(
            row, VOCABULARY, largest, factor, least, lowest, share, top_k, COUNT=True, STRICT=False
        )
        above, _, equal, _ = _at(row, VOCABULARY, largest, factor, least, lowest)
        left = top_k - above
        share = left / tl.maximum(equal, 1.0)
    if top_p < 1.0:
        nucleus, target = _find(
            row, VOCABULARY, largest, factor, least, lowest, share, top_p, COUNT=False, STRICT=False
        )
        _, weights, equal, one = _at(row, VOCABULARY, largest, factor, least, nucleus)
        there = tl.where(nucleus == lowest, tl.minimum(left, equal), equal)
        needed = tl.ceil((target - weights) / tl.maximum(one, 1e-37))
        left = tl.minimum(tl.maximum(needed, 1.0), there)
        share = left / tl.maximum(equal, 1.0)
        lowest = nucleus
    drawn, target = _find(
        row, VOCABULARY, largest, factor, least, lowest, share, number, COUNT=False, STRICT=True
    )
    _, weights, equal, one = _at(row, VOCABULARY, largest, factor, least, drawn)
    there = tl.where(drawn == lowest, tl.minimum(left, equal), equal)
    place = tl.floor((target - weights) / tl.maximum(one, 1e-37))
    place = tl.minimum(tl.maximum(place, 0.0), there - 1.0).to(tl.int32)

    token = place * 0
    before = place * 0
    for first in range(0, VOCABULARY, CHUNK):
        key, _weight, inside = _chunk(row, first, VOCABULARY, largest, factor, least)
        same = (inside & (key == drawn)).to(tl.int32)
        hit = (same == 1) & (before + tl.cumsum(same, axis=0) - 1 == place)
        token += tl.sum(tl.where(hit, first + tl.arange(0, CHUNK), 0), axis=0)
        before += tl.sum(same, axis=0)
    tl.store(tokens + index, token.to(tl.int64))
