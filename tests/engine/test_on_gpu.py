"""What only a GPU can show. The bodies are functions: test_gpu_check.py calls them on the CPU.

They need nothing of conftest.py: a GPU machine may lack what it imports.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.agreement import agree, demo_conversations
from benchmarks.gpu_check.stage import ON_A_GPU, Place
from demo.random_checkpoint import DEMO
from tests.checkpoints import tiny_llava
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no NVIDIA GPU here; test_gpu_check.py runs the bodies of these tests on the CPU",
)

MIB = 1 << 20
AT_ONCE = 16
"""Sessions open at the same time."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on a gpu") / "tiny"
    return tiny_llava(folder, text="mistral", kv_heads=2, image_size=56, seed=1)


def check_answers_agree(place: Place, turns: int) -> None:
    """Greedy answers of the demo checkpoint are transformers', but for what rounding explains."""
    agreement = agree(DEMO, place, demo_conversations(), turns, tokens=24)
    assert agreement.answers >= turns
    assert agreement.tokens > turns
    assert agreement.unexplained == 0, agreement.differences


def check_sessions_come_back(checkpoint: Path, device: str) -> None:
    """Who was evicted to host memory answers as who stayed; what blocks held is really gone."""
    answers = []
    for leaves in (False, True):
        harness = EngineHarness(checkpoint, device=device, dtype=_dtype(device))
        try:
            texts = []
            for number, picture in enumerate(PICTURES[:3]):
                asked = harness.ask(
                    str(number), "What is it?", [picture], start=True, max_tokens=12
                )
                texts.append(asked[0])
            for _ in range(2):
                if leaves:
                    assert harness.evict_idle() == 3
                    harness.poison_free_blocks()
                for number in range(3):
                    texts.append(harness.ask(str(number), "And what else?", max_tokens=12)[0])
            counts = harness.engine.statistics()
            assert counts.restored_from_host == (6 if leaves else 0)
            harness.check_state()
            answers.append(texts)
        finally:
            harness.shutdown()
    assert answers[0] == answers[1]


def check_nothing_leaks(
    checkpoint: Path, device: str, sessions: int, used: Callable[[], int], allowed: int
) -> None:
    """Whole sessions, some of them closed or cancelled midway; memory is then as it was.

    Args:
        checkpoint: a tiny one.
        device: "cuda" or "cpu".
        sessions: how many; the first quarter warms up.
        used: bytes in use now.
        allowed: bytes that it may grow by.
    """
    harness = EngineHarness(checkpoint, device=device, dtype=_dtype(device))
    try:
        before = 0
        for first in range(0, sessions, AT_ONCE):
            if first >= sessions // 4 and not before:
                harness.assert_nothing_is_held()
                before = used()
            _hold(harness, range(first, first + AT_ONCE))
        harness.assert_nothing_is_held()
        grown = used() - before
        assert grown <= allowed, f"{grown} bytes more after {sessions} sessions"
    finally:
        harness.shutdown()


def _hold(harness: EngineHarness, numbers: range) -> None:
    names = [f"leak {number}" for number in numbers]
    opened = [
        harness.submit(name, f"Number {name}?", [PICTURES[index % 8]], start=True, max_tokens=4)
        for index, name in enumerate(names)
    ]
    for pending in opened:
        pending.wait()
    later = [harness.submit(name, "And now?", max_tokens=4) for name in names]
    for index, (name, pending) in enumerate(zip(names, later, strict=True)):
        if index % 4 == 0:
            harness.engine.close(name)  # whatever its turn is doing
        else:
            pending.wait()
    if numbers.start % (8 * AT_ONCE) == 0:
        harness.evict_idle()
    for index, name in enumerate(names):
        if index % 4:
            harness.ask(name, end=True)


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _allocated() -> int:
    gc.collect()  # an engine before this one is a cycle: freed meanwhile, it would hide a leak
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@needs_gpu
def test_answers_agree_with_transformers_on_the_gpu() -> None:
    check_answers_agree(Place.of(cpu=False), turns=40)


@needs_gpu
def test_evicted_sessions_come_back_to_the_gpu(tiny: Path) -> None:
    check_sessions_come_back(tiny, "cuda")


@needs_gpu
def test_two_thousand_sessions_leak_no_gpu_memory(tiny: Path) -> None:
    check_nothing_leaks(tiny, "cuda", ON_A_GPU.leak_sessions, _allocated, allowed=MIB)
