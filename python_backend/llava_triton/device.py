"""Where and in what the models compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of `Settings.dtype`; "auto" is float32 on a CPU, where answers are compared token
    for token, and a half type on a GPU."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def cuda_graph(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Record a computation, so that it costs one launch instead of some hundreds.

    Args:
        run: reads and writes the same tensors at every call, and waits for nothing.
        device: a GPU that nobody else uses while it records.
        pool: of `torch.cuda.graph_pool_handle`; graphs of one pool share memory and never run at
            the same time.

    Returns:
        Does what `run` does. Its result holds until a graph of the pool runs again.
    """
    # Before it is recorded, on a stream of its own: libraries make their workspaces and kernels
    # are compiled when they are first used.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
