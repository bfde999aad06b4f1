"""Large blocks of memory go back to the system as soon as they are freed.

glibc's `malloc` maps a block of 128 KiB or more by itself, and unmaps it when it is freed; but with
each that is freed it raises this limit, up to 32 MiB. From then on pictures of some megabytes lie
in the heaps of tritonserver's 200 threads, which only grow: 100,000 sessions with pictures of up to
7 MB through gRPC took it from 290 to 930 MiB. A limit that is set stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes

LARGE_BLOCK_BYTES = 1024 * 1024
_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def give_back_large_blocks() -> None:
    """Set the limit for this process; a C library without such a one is left alone."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
