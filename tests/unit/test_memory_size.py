"""How the device's memory is shared out."""

from __future__ import annotations

import pytest
import torch

from llava_triton.contract.settings import Settings
from llava_triton.device import host_bytes
from llava_triton.model.memory_size import blocks_for, features_budget, host_budgets

PICTURE = 576 * 4096 * 2
"""Bytes of a picture's features in LLaVA-1.5-7B, in a half type."""
BLOCK = 16 * 2 * 32 * 4096 * 2
"""Bytes of its 16 tokens' keys and values."""
FREE = 64 << 30
"""Of an 80 GB GPU beside the weights, about."""
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def shares(settings: Settings, device: torch.device) -> tuple[int, int]:
    """Bytes for image features, and for keys and values."""
    features = features_budget(settings, PICTURE, FREE, device)
    return features, BLOCK * blocks_for(settings, BLOCK, 4096, FREE, features, device)


def test_a_gpu_holds_thousands_of_pictures_and_64_long_conversations() -> None:
    features, cache = shares(Settings(max_sessions=6000), GPU)
    assert features > 5000 * PICTURE
    assert cache > 64 * 1000 // 16 * BLOCK
    assert features + cache < 0.9 * FREE


def test_few_sessions_leave_their_share_to_keys_and_values() -> None:
    features, cache = shares(Settings(max_sessions=64), GPU)
    assert features == 64 * 8 * PICTURE
    assert cache > 0.7 * FREE
    # Nor more blocks than all of them could use.
    assert shares(Settings(max_sessions=4), GPU)[1] == 4 * 257 * BLOCK


@pytest.mark.parametrize("device", [GPU, CPU], ids=["GPU", "CPU"])
def test_what_an_operator_names_is_taken(device: torch.device) -> None:
    settings = Settings(kv_cache_bytes=10 * BLOCK, image_features_bytes=12345)
    assert shares(settings, device) == (12345, 10 * BLOCK)


def test_a_cpu_leaves_half_to_others() -> None:
    settings = Settings(max_sessions=6000)
    used = sum(shares(settings, CPU)) + sum(host_budgets(settings, FREE, CPU))
    assert 0.4 * FREE < used <= 0.5 * FREE


def test_beside_a_gpu_half_of_the_host_is_for_what_leaves_it() -> None:
    assert host_budgets(Settings(), FREE, GPU) == (FREE // 4, FREE // 4)
    assert host_budgets(Settings(host_cache_bytes=1), FREE, GPU) == (1, 1)
    assert host_budgets(Settings(host_cache_bytes=1), FREE, CPU) == (1, 1)


def test_a_copy_in_pinned_memory_is_counted_with_what_torch_rounds_it_up_by() -> None:
    assert host_bytes(BLOCK, CPU) == BLOCK
    assert host_bytes(BLOCK, GPU) == BLOCK == 8 << 20
    assert host_bytes(BLOCK + 1, GPU) == 2 * BLOCK
