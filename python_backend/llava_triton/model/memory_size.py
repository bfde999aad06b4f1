"""How much memory there is, and how many blocks of keys and values to make of it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from llava_triton.contract.engines import engines_here
from llava_triton.contract.settings import Settings
from llava_triton.kernels.base import BLOCK_TOKENS

SESSION_PICTURES = 8
"""Of a session at the most, where memory is planned; it may have more where there is room."""
GPU_SHARE = 0.86
"""Of the GPU's free memory after the weights, for keys, values and image features; the rest is for
what a step computes, for recorded steps, and for the vision encoder in its own process."""
FEATURES_SHARE = 0.36
"""Of the same, at most for image features: 5,000 pictures beside LLaVA-1.5-7B on 80 GB."""
HOST_SHARE = 0.25
"""Of the host's free memory, beside a GPU, for keys and values that had to leave it, and as much
again for image features."""
CPU_SHARE = 0.25
"""Of the host's free memory, where it is the device, for keys and values; half as much for copies
of them, and for image features: half of it is for others."""


def device_memory(device: torch.device) -> int:
    """Free bytes of the device."""
    if device.type == "cuda":
        # What torch keeps of freed tensors is free, too: packing leaves the weights' old pieces.
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory()


def host_memory() -> int:
    """Free bytes of the host, as far as this process's control group lets it: of several engines
    on the machine, an equal part of them."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free // (engines_here() or 1)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None


def features_budget(settings: Settings, picture_bytes: int, free: int, device: torch.device) -> int:
    """Bytes of the device for image features.

    Args:
        settings: limits.
        picture_bytes: of one picture's features.
        free: bytes of the device.
        device: what it is.
    """
    share = FEATURES_SHARE if device.type == "cuda" else CPU_SHARE / 2
    useful = settings.max_sessions * SESSION_PICTURES * picture_bytes
    return settings.image_features_bytes or min(int(free * share), useful)


def blocks_for(
    settings: Settings,
    block_bytes: int,
    context_length: int,
    free: int,
    features: int,
    device: torch.device,
) -> int:
    """Blocks of the pool: as many as the setting or the device's memory allows, but no more than
    all sessions could ever use.

    Args:
        settings: limits.
        block_bytes: of one block over all layers.
        context_length: of the model, in tokens.
        free: bytes of the device.
        features: those of them that image features may have.
        device: what it is.
    """
    left = free * GPU_SHARE - features if device.type == "cuda" else free * CPU_SHARE
    allowed = settings.kv_cache_bytes or int(left)
    # One more block a session than its tokens need: for a copy before a write.
    useful = settings.max_sessions * (-(-context_length // BLOCK_TOKENS) + 1)
    return max(1, min(useful, allowed // block_bytes))


def host_budgets(settings: Settings, free: int, device: torch.device) -> tuple[int, int]:
    """Bytes of host memory for what leaves the device: keys and values, and image features.

    Args:
        settings: limits.
        free: bytes of the host.
        device: where the others are.
    """
    if settings.host_cache_bytes is not None:
        return settings.host_cache_bytes, settings.host_cache_bytes
    if device.type == "cuda":
        return int(free * HOST_SHARE), int(free * HOST_SHARE)
    # Features would go from the host's memory to the host's memory.
    return int(free * CPU_SHARE / 2), 0
