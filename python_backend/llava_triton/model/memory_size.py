"""How much memory there is, and how many blocks of keys and values to make of it."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_triton.contract.engines import engines_here
from llava_triton.contract.settings import Settings
from llava_triton.kernels.base import BLOCK_TOKENS

SESSION_PICTURES = 8
"""Of a session at the most, where memory is planned; it may have more where there is room."""
CONTEXT_BYTES = 512 * 1024 * 1024
"""Of a GPU, for each process that uses it, before it has allocated anything. Not measured yet."""
OTHER_CONTEXTS = 3
"""`image_encoder`, `vision_encoder` and Triton itself."""
BYTES_A_TOWER_PARAMETER = 4
"""Its weights in a half type, and as much again for what it computes."""
STEP_BYTES = 1024 * 1024 * 1024
"""Of a GPU, for what a step computes beside its logits: of LLaVA-1.5-7B 130 MB for 1,024 rows, 200
MB for partial sums of attention, 64 MB of libraries' workspaces, and a few MB for each graph."""
LOGITS_COPIES = 4
"""Of a step's logits in float32: those of the model, and what choosing tokens makes of them."""
FEATURES_SHARE = 0.4
"""Of a GPU's memory for keys, values and image features, at most for image features: 5,000 pictures
beside LLaVA-1.5-7B on 80 GB."""
LEAST_TEXT_TOKENS = 256
"""Beside a picture: a memory that holds no more than that has no use."""
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


@dataclass(frozen=True)
class GpuNeeds:
    """What a GPU's memory is needed for beside weights, keys, values and image features."""

    others: int
    """Bytes of the other processes, whether they have them yet or not."""
    step: int
    """Bytes that a step of this process needs at the most."""

    @classmethod
    def of(cls, tower_parameters: int, sequences: int, vocabulary: int) -> GpuNeeds:
        """Of a model with such a vision tower, for steps of so many sequences."""
        return cls(
            OTHER_CONTEXTS * CONTEXT_BYTES + BYTES_A_TOWER_PARAMETER * tower_parameters,
            STEP_BYTES + LOGITS_COPIES * 4 * sequences * vocabulary,
        )


def gpu_budget(free: int, total: int, own: int, needs: GpuNeeds) -> int:
    """Bytes of a GPU for keys, values and image features.

    The other processes may have started before this one or do so later: what they need is taken off
    once, either as they have taken it or as it will be.

    Args:
        free: bytes, now that the weights are loaded.
        total: bytes.
        own: bytes that this process has allocated.
        needs: of everything else.
    """
    return max(0, min(free, total - own - CONTEXT_BYTES - needs.others) - needs.step)


def memory_budget(device: torch.device, needs: GpuNeeds) -> int:
    """Bytes of the device to be shared out: a GPU's by `gpu_budget`, of a host all that is free."""
    free = device_memory(device)
    if device.type != "cuda":
        return free
    total = int(torch.cuda.mem_get_info(device)[1])
    return gpu_budget(free, total, torch.cuda.memory_reserved(device), needs)


def features_budget(
    settings: Settings, picture_bytes: int, budget: int, device: torch.device
) -> int:
    """Bytes of the device for image features.

    Args:
        settings: limits.
        picture_bytes: of one picture's features.
        budget: from `memory_budget`.
        device: what it is.
    """
    share = FEATURES_SHARE if device.type == "cuda" else CPU_SHARE / 2
    useful = settings.max_sessions * SESSION_PICTURES * picture_bytes
    return settings.image_features_bytes or min(int(budget * share), useful)


def blocks_for(
    settings: Settings,
    block_bytes: int,
    context_length: int,
    budget: int,
    features: int,
    device: torch.device,
) -> int:
    """Blocks of the pool: as many as the setting or the device's memory allows, but no more than
    all sessions could ever use.

    Args:
        settings: limits.
        block_bytes: of one block over all layers.
        context_length: of the model, in tokens.
        budget: from `memory_budget`.
        features: bytes of it that image features may have.
        device: what it is.
    """
    left = budget - features if device.type == "cuda" else budget * CPU_SHARE
    allowed = settings.kv_cache_bytes or max(0, int(left))
    # One more block a session than its tokens need: for a copy before a write.
    useful = settings.max_sessions * (-(-context_length // BLOCK_TOKENS) + 1)
    return min(useful, allowed // block_bytes)


def check_blocks(blocks: int, picture_tokens: int, settings: Settings, device: torch.device) -> int:
    """The blocks, where they are enough for a conversation about a picture.

    Raises:
        ValueError: they are not. (What an operator has named only has to be a block.)
    """
    tokens = picture_tokens + LEAST_TEXT_TOKENS if settings.kv_cache_bytes is None else 1
    if blocks * BLOCK_TOKENS < tokens:
        where = "GPU" if device.type == "cuda" else "host"
        raise ValueError(
            f"the {where}'s memory has room for the keys and values of {blocks * BLOCK_TOKENS} "
            f"tokens beside the model, and a conversation about one picture needs {tokens}; end "
            'what else uses it, take the setting "weights": "int4", or a machine with more memory'
        )
    return blocks


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
