"""Memory for a CPU's pages, fetched from the system little by little, before it is written.

The system gives memory when it is first written: zeroed, at about a gigabyte a second, two
megabytes at once. Where all sessions begin a new block in the same step, their streams stall for
that (measured: 60 to 170 ms beside steps of 35 ms). To fetch everything at the start would take
seconds, and memory that perhaps nobody needs; a thread of its own would take a core from the step
that is computed.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator, Sequence

from torch import Tensor

log = logging.getLogger(__name__)

AHEAD_BYTES = 128 * 1024 * 1024
"""So much is there before it is used; blocks are given out lowest first."""
PIECE_BYTES = 2 * 1024 * 1024
"""Fetched at once."""
PIECES_A_STEP = 2
"""More than 64 sessions begin to use in a step on the average; 5 ms of it at the most."""
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; Python's mmap does not name it


class Prefault:
    """Keeps memory ahead of the highest block in use.

    Args:
        pages: tensors on the CPU, [layers, blocks, ...].
    """

    def __init__(self, pages: Sequence[Tensor]) -> None:
        blocks = pages[0].shape[1]
        self._ahead = max(1, AHEAD_BYTES * blocks // max(1, sum(each.nbytes for each in pages)))
        self._pieces = _pieces(pages)
        self._fetched = 0
        """Blocks below it have their memory."""
        self._fetch(self._ahead)

    def used(self, block: int) -> None:
        """A step uses blocks up to this one; fetches a little where memory is short."""
        self._fetch(block + 1 + self._ahead, PIECES_A_STEP)

    def _fetch(self, end: int, most: int | None = None) -> None:
        while self._fetched < end and most != 0:
            self._fetched, address, size = next(self._pieces, (end, 0, 0))
            most = None if most is None else most - 1
            if size and not _populate(address, size):
                self._pieces = iter(())


def _pieces(pages: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
    """For every piece: the blocks below which all have their memory, its address, its bytes."""
    blocks = pages[0].shape[1]
    group = max(1, PIECE_BYTES // max(1, pages[0][0, :1].nbytes))
    for start in range(0, blocks, group):
        for tensor in pages:
            for layer in tensor:
                part = layer[start : start + group]
                address = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
                yield start, address, part.data_ptr() + part.nbytes - address


def _populate(address: int, size: int) -> bool:
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE) == 0:
        return True
    # Nothing is wrong: the memory comes when it is written, as ever.
    log.debug("memory was not fetched: %s", os.strerror(ctypes.get_errno()))
    return False


_libc = ctypes.CDLL(None, use_errno=True)
