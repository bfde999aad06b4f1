"""How long kernels take in step 1 of `make gpu-check`: within a CUDA graph, as they are used."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 7
"""Of a graph; the median counts."""


def seconds_each(runs: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Seconds of one of several computations that follow each other.

    Args:
        runs: of one kind, each on tensors of its own: what the cache keeps of one is no use to the
            next, if they are larger than it.
        device: where they compute. Without a GPU each is run once.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - began) / len(runs)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles kernels, makes workspaces
        runs[0]()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    took = []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1000.0)
    return float(statistics.median(took[1:])) / len(runs)


def copies_beyond_the_cache(
    each_bytes: int, device: torch.device, *, least: int = 1, most: int = 32
) -> int:
    """How many tensors of this size no GPU's cache holds together (an H100's has 50 MB)."""
    if device.type != "cuda":
        return 1
    return max(least, min(most, -(-(200 << 20) // max(1, each_bytes))))
