"""How the device's memory is shared out."""

from __future__ import annotations

import pytest
import torch

from benchmarks.workload import GEOMETRIES
from llava_triton.checkpoint.weights import PIECE_BYTES
from llava_triton.contract.settings import Settings
from llava_triton.device import host_bytes
from llava_triton.model.memory_size import (
    CONTEXT_BYTES,
    LEAST_TEXT_TOKENS,
    GpuNeeds,
    blocks_for,
    check_blocks,
    features_budget,
    gpu_budget,
    host_budgets,
)

PICTURE_TOKENS = 576
PICTURE = PICTURE_TOKENS * 4096 * 2
"""Bytes of a picture's features in LLaVA-1.5-7B, in a half type."""
BLOCK = 16 * 2 * 32 * 4096 * 2
"""Bytes of its 16 tokens' keys and values."""
TOWER = 304_000_000 + 21_000_000
"""Parameters of its vision tower and projector, about."""
LAYERS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
TABLES = 2 * 32064 * 4096
GROUP_BYTES = 5
"""A scale and a zero point."""
WEIGHTS = {
    "unrounded": 2 * (LAYERS + TABLES),
    "int8": LAYERS + 2 * TABLES,
    "int4": LAYERS // 2 + LAYERS // 128 * GROUP_BYTES + 2 * TABLES,
}
"""Bytes of its text model, by the setting."""
MIB, GIB = 1 << 20, 1 << 30
CARDS = {"24 GB": 22 * GIB, "80 GB": 79 * GIB}
"""Bytes of GPUs as CUDA tells them, rounded down: an A10G (g5) or L4 (g6), an H100 or A100."""
BUDGET = 60 * GIB
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def budget(card: str, weights: str = "unrounded", *, others_started: bool = False) -> int:
    """Bytes for keys, values and image features of LLaVA-1.5-7B, with settings as they are."""
    needs = GpuNeeds.of(TOWER, Settings().max_sessions, 32064)
    own = WEIGHTS[weights]
    taken = own + CONTEXT_BYTES + (needs.others if others_started else 0)
    return gpu_budget(CARDS[card] - taken, CARDS[card], own, needs)


def shares(settings: Settings, device: torch.device, given: int = BUDGET) -> tuple[int, int]:
    """Bytes for image features, and for keys and values."""
    features = features_budget(settings, PICTURE, given, device)
    return features, BLOCK * blocks_for(settings, BLOCK, 4096, given, features, device)


def test_the_geometry_is_the_benchmarks() -> None:
    text = GEOMETRIES["llava-1.5-7b"].text
    assert (text["hidden_size"], text["num_hidden_layers"]) == (4096, 32)
    assert text["intermediate_size"] == 11008


def test_a_7b_model_fits_a_24_gb_card() -> None:
    # The default instance: answers for several sessions at once, and room to spare for pictures.
    settings = Settings()
    features, cache = shares(settings, GPU, budget("24 GB"))
    assert cache >= 4 * 1000 // 16 * BLOCK
    assert features >= 200 * PICTURE
    check_blocks(cache // BLOCK, PICTURE_TOKENS, settings, GPU)
    smaller = [shares(settings, GPU, budget("24 GB", weights))[1] for weights in ("int8", "int4")]
    assert smaller[0] > 2 * cache
    assert smaller[1] > 1.2 * smaller[0]


def test_a_host_of_16_gib_is_enough_to_load_and_serve_it() -> None:
    # What the system and five processes have before and after the weights went through. The weights
    # themselves are in host memory by pieces.
    processes = 5 * GIB
    free = 16 * GIB - processes
    assert PIECE_BYTES < 64 * MIB
    kept = sum(host_budgets(Settings(), free, GPU))
    assert kept + PIECE_BYTES < free - 4 * GIB
    assert kept >= 16 * 1000 // 16 * BLOCK / 2


def test_an_80_gb_card_holds_thousands_of_pictures_and_64_long_conversations() -> None:
    features, cache = shares(Settings(max_sessions=6000), GPU, budget("80 GB"))
    assert features > 5000 * PICTURE
    assert cache > 64 * 1000 // 16 * BLOCK


@pytest.mark.parametrize("card", CARDS)
def test_the_other_processes_are_counted_once(card: str) -> None:
    assert budget(card) == budget(card, others_started=True) > 0


def test_what_others_use_besides_is_not_shared_out() -> None:
    needs = GpuNeeds(others=3 * GIB, step=GIB)
    assert gpu_budget(4 * GIB, 80 * GIB, 10 * GIB, needs) == 3 * GIB
    assert gpu_budget(GIB // 2, 80 * GIB, 10 * GIB, needs) == 0


def test_too_little_memory_is_an_error_that_says_what_to_do() -> None:
    least = (PICTURE_TOKENS + LEAST_TEXT_TOKENS) // 16
    assert check_blocks(least, PICTURE_TOKENS, Settings(), GPU) == least
    with pytest.raises(ValueError, match=r"room for the keys and values of 816 tokens .*int4"):
        check_blocks(least - 1, PICTURE_TOKENS, Settings(), GPU)
    # What an operator has named is taken, unless it is nothing at all.
    named = Settings(kv_cache_bytes=1)
    assert check_blocks(1, PICTURE_TOKENS, named, GPU) == 1
    with pytest.raises(ValueError, match="room for the keys and values of 0 tokens"):
        check_blocks(0, PICTURE_TOKENS, named, CPU)


def test_few_sessions_leave_their_share_to_keys_and_values() -> None:
    features, cache = shares(Settings(max_sessions=64), GPU)
    assert features == 64 * 8 * PICTURE
    assert BUDGET - features - BLOCK < cache <= BUDGET - features
    # Nor more blocks than all of them could use.
    assert shares(Settings(max_sessions=4), GPU)[1] == 4 * 257 * BLOCK


@pytest.mark.parametrize("device", [GPU, CPU], ids=["GPU", "CPU"])
def test_what_an_operator_names_is_taken(device: torch.device) -> None:
    settings = Settings(kv_cache_bytes=10 * BLOCK, image_features_bytes=12345)
    assert shares(settings, device) == (12345, 10 * BLOCK)


def test_a_cpu_leaves_half_to_others() -> None:
    settings = Settings(max_sessions=6000)
    used = sum(shares(settings, CPU)) + sum(host_budgets(settings, BUDGET, CPU))
    assert 0.4 * BUDGET < used <= 0.5 * BUDGET


def test_beside_a_gpu_half_of_the_host_is_for_what_leaves_it() -> None:
    assert host_budgets(Settings(), BUDGET, GPU) == (BUDGET // 4, BUDGET // 4)
    assert host_budgets(Settings(host_cache_bytes=1), BUDGET, GPU) == (1, 1)
    assert host_budgets(Settings(host_cache_bytes=1), BUDGET, CPU) == (1, 1)


def test_a_copy_in_pinned_memory_is_counted_with_what_torch_rounds_it_up_by() -> None:
    assert host_bytes(BLOCK, CPU) == BLOCK
    assert host_bytes(BLOCK, GPU) == BLOCK == 8 << 20
    assert host_bytes(BLOCK + 1, GPU) == 2 * BLOCK
