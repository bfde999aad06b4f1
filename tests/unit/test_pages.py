"""Blocks of keys and values that leave the device and come back."""

from __future__ import annotations

import random

import pytest
import torch

from llava_triton.kernels.base import AttentionGeometry
from llava_triton.model import kv_pages
from llava_triton.model.kv_pages import CHUNK_BLOCKS, Pages

BLOCKS = 60


@pytest.fixture
def pages() -> Pages:
    geometry = AttentionGeometry(heads=4, kv_heads=2, head_dim=8, scale=1.0)
    pages = Pages(3, BLOCKS, geometry, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    pages.keys.normal_()
    pages.values.normal_()
    return pages


@pytest.mark.parametrize("count", [1, CHUNK_BLOCKS, CHUNK_BLOCKS + 1, 3 * CHUNK_BLOCKS - 1])
def test_any_stretch_of_a_copy_comes_back_where_it_is_wanted(pages: Pages, count: int) -> None:
    rng = random.Random(count)
    left = rng.sample(range(BLOCKS), count)
    keys, values = pages.keys[:, left].clone(), pages.values[:, left].clone()
    copies = pages.to_host(left)
    assert sum(each.nbytes for pair in copies for each in pair) == pages.host_bytes(count)
    pages.keys.fill_(torch.nan)
    pages.values.fill_(torch.nan)
    for first in {0, count // 2, count - 1}:
        places = rng.sample(range(BLOCKS), count - first)
        pages.from_host(copies, first, places)
        assert torch.equal(pages.keys[:, places], keys[:, first:])
        assert torch.equal(pages.values[:, places], values[:, first:])
    pages.keys.fill_(0)
    pages.from_host(copies, 0, list(range(count)))
    assert pages.keys[:, count:].count_nonzero() == 0  # nothing else is written


def test_memory_is_pinned_at_start_in_the_sizes_that_copies_take(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch hands pinned memory out again in the sizes that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def noted(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        asked.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(kv_pages, "pinned_memory", noted)
    piece = pages.host_bytes(CHUNK_BLOCKS)
    pages.pin_host_memory(3 * piece + 1)
    copies = pages.to_host(range(CHUNK_BLOCKS))
    assert asked == [tuple(each.shape) for each in copies[0]] * 3
    asked.clear()
    pages.pin_host_memory(piece - 1)
    assert asked == []


def test_keys_lie_as_values_where_the_kernels_want_it() -> None:
    geometry = AttentionGeometry(heads=4, kv_heads=2, head_dim=8, scale=1.0)
    by_token = Pages(1, 2, geometry, torch.float32, torch.device("cpu"), keys_by_token=True)
    assert by_token.keys.shape == by_token.values.shape == (1, 3, 2, 16, 8)
