"""Where and in what the models compute."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIRST_TOKEN_PAUSE_SECONDS = 0.002
"""So long at the most a CPU's cores are left to what brings a first token to its client, before
they compute the next step. Computing, they delay it by more: through Triton a later turn's first
token came after 23 instead of 19 ms, and at 16 sessions no token per second is lost, because it has
to be sent at some time anyway."""
FIRST_TOKEN_PAUSE_SHARE = 0.25
"""Of a step's time, at the most: beside short steps the whole pause would cost more than it
gives."""


@dataclass(frozen=True)
class DevicePolicy:
    """What depends on whether a model computes on a GPU or on the cores that this process needs."""

    steps_at_once: int
    """Steps that may be launched before the first one's tokens are there. A GPU is never idle
    between two then; a CPU's cores have nothing to gain from it, and a new turn would wait for one
    step more."""
    prefill_chunk_tokens: int
    """Prompt tokens of a step at the most, where the settings do not say."""
    decode_graphs: bool
    """Whether decode steps are captured as CUDA graphs when the model loads."""
    is_host: bool
    """Whether it has the host's cores and memory: the pages are fetched from the system ahead of
    their use, threads are counted, and nothing is pinned."""


_CPU = DevicePolicy(steps_at_once=1, prefill_chunk_tokens=512, decode_graphs=False, is_host=True)
_GPU = DevicePolicy(steps_at_once=2, prefill_chunk_tokens=1024, decode_graphs=True, is_host=False)


def policy_of(device: torch.device) -> DevicePolicy:
    """How a device is used."""
    return _GPU if device.type == "cuda" else _CPU


def leave_cores(step_seconds: float) -> None:
    """Let other threads send what is there, before a CPU that needs their cores computes on.

    Args:
        step_seconds: what a step takes.
    """
    time.sleep(min(FIRST_TOKEN_PAUSE_SECONDS, FIRST_TOKEN_PAUSE_SHARE * step_seconds))


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of(device: torch.device) -> str:
    """For a sentence."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of `Settings.dtype`; "auto" is float32 on a CPU, where answers are compared token
    for token, and a half type on a GPU.

    Raises:
        ValueError: float16 on a CPU.
    """
    if name == "float16" and device.type == "cpu":
        raise ValueError('setting dtype is "float16", which needs a GPU; take bfloat16 or float32')
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device.type == "cpu":
        return torch.float32
    # A T4 has no products in bfloat16; torch would compute them in another way, slowly.
    exact = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if exact else torch.float16


def to_host(tensor: Tensor) -> Tensor:
    """A tensor of any shape and type in host memory: itself where it lies there.

    Of a GPU's a copy in pinned memory, made in the order of the current stream without waiting for
    it. It is for `to` on that stream only; whoever reads it otherwise waits for the stream.
    """
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def to_device(numbers: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Numbers of the host on a device, in the array's shape and type, copied in the order of the
    current stream without waiting for it. On a CPU they share the array's memory."""
    tensor = torch.from_numpy(numbers)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTimer:
    """Measures a piece of a device's work, which may be done long after it was asked for.

    It begins when it is made, in the order of the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            # Blocking: the thread that waits for the end would else spin, on a core that the
            # thread that launches could use.
            self._events = [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)]
            self._events[0].record()
        self._began = time.perf_counter()

    def end(self) -> None:
        """The piece ends here, in the order of the current stream."""
        if self._events:
            self._events[1].record()
        self._ended = time.perf_counter()

    def wait(self) -> float:
        """Seconds that it took; returns when it is done. For any thread."""
        if not self._events:
            return self._ended - self._began
        begin, end = self._events
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0


def work_beside(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU what is done within does not wait for what the other threads have asked for. Only
    for tensors that are complete, and those made of them."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_stream_beside(device))


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def switch_threads_quickly(device: torch.device) -> None:
    """On a GPU the thread that launches steps gets Python's lock within a millisecond, where others
    want it too: Python's own 5 ms are as long as a step."""
    if device.type == "cuda":
        sys.setswitchinterval(0.001)


def is_lost(device: torch.device) -> bool:
    """Whether the device can be used no more: after a fault within a kernel everything that this
    process asks of a GPU fails, until it ends."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def host_bytes(size: int, device: torch.device) -> int:
    """Bytes of host memory that `to_host` takes for so many of a device's: torch hands out pinned
    memory in powers of two."""
    return 1 << (size - 1).bit_length() if device.type == "cuda" else size


def bytes_on_host(tensor: Tensor) -> int:
    """Bytes that `to_host` takes for a tensor, or has taken for it."""
    pinned = tensor.is_cuda or tensor.is_pinned()
    return host_bytes(tensor.nbytes, torch.device("cuda" if pinned else "cpu"))


def wait_for(tensor: Tensor) -> None:
    """Return when what the current stream computes of a tensor is there, for whoever is going to
    read it elsewhere."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def keep_for_current_stream(tensor: Tensor) -> None:
    """A tensor made in another stream is read in this one: its memory is not given away before."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def graph_pool(device: torch.device) -> Any:
    """Memory that CUDA graphs share, which never run at the same time; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def cuda_graph(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Capture a computation as a CUDA graph: it then costs one launch instead of some hundreds.

    Args:
        run: reads and writes the same tensors at every call, and waits for nothing.
        device: one that nobody else uses meanwhile; on a CPU nothing is captured.
        pool: of `graph_pool`.

    Returns:
        Does what `run` does. Its result holds until a graph of the pool runs again.
    """
    if device.type != "cuda":
        return run
    # Before it is captured, on a stream of its own: libraries make their workspaces and kernels
    # are compiled when they are first used.
    stream = _warming_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    # A graph knows addresses alone: what `run` reads lives as long as `run` does.
    return functools.partial(_replay, graph, result, run)


def _replay(graph: torch.cuda.CUDAGraph, result: Tensor, _: Callable[[], Tensor]) -> Tensor:
    graph.replay()
    return result


@functools.cache
def _warming_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: libraries keep workspaces for every stream that they have seen."""
    return torch.cuda.Stream(device)
