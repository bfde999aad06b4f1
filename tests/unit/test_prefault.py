"""Memory of the CPU's pages is there before it is written."""

from __future__ import annotations

import mmap
import resource

import pytest
import torch

from llava_triton.model import prefault
from llava_triton.model.prefault import Prefault

MIB = 1024 * 1024
LAYERS, BLOCKS = 2, 256


def is_there(pages: torch.Tensor, block: int) -> bool:
    """Whether writing a block costs no faults: it has 512 pages of 4 KiB, and Python a few."""

    def count() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

    before = count()
    pages[:, block] = 1
    return count() - before < 100


@pytest.fixture
def pages() -> torch.Tensor:
    """Blocks of a megabyte a layer, in small pages whatever the system prefers. New from the
    system: what torch gets may be memory that this process has used before, which is there."""
    memory = mmap.mmap(-1, LAYERS * BLOCKS * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(LAYERS, BLOCKS, MIB)


@pytest.fixture
def touch(pages: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Prefault:
    monkeypatch.setattr(prefault, "AHEAD_BYTES", 16 * LAYERS * MIB)  # 16 blocks
    return Prefault([pages])


def test_memory_is_ahead_of_what_is_used(touch: Prefault, pages: torch.Tensor) -> None:
    assert is_there(pages, 10)
    assert not is_there(pages, 100)
    for block in range(64):  # two pieces of two blocks in one layer a step: faster than the use
        touch.used(block)
    assert is_there(pages, 70)
    assert not is_there(pages, 150)
    for _ in range(BLOCKS):
        touch.used(BLOCKS - 1)
    assert is_there(pages, BLOCKS - 1)


def test_it_changes_nothing(touch: Prefault, pages: torch.Tensor) -> None:
    pages[:, 50] = 7
    for _ in range(BLOCKS):
        touch.used(BLOCKS - 1)
    assert (pages[:, 50] == 7).all()
