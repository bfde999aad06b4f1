"""Turns and limits for tests of the engine on a tiny checkpoint; conftest.py has the fixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.engine.session import SessionId
from llava_triton.engine.state import EngineState
from llava_triton.kernels.base import BLOCK_TOKENS
from tests.engine_harness import EngineHarness, Pending

HANG_SECONDS = 20.0
"""Nothing here takes this long where the engine's thread lives."""
PICTURES = [Image.new("RGB", (60, 60), (30 * number, 240 - 30 * number, 80)) for number in range(8)]
PICTURE_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """One turn."""

    text: str | None
    images: tuple[Image.Image, ...] = ()
    max_tokens: int = 20
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def submit(self, harness: EngineHarness, session_id: SessionId, **flags: Any) -> Pending:
        """Send it."""
        return harness.submit(
            session_id,
            self.text,
            self.images,
            max_tokens=self.max_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            **flags,
        )

    def wait(
        self, harness: EngineHarness, session_id: SessionId, **flags: Any
    ) -> tuple[str, Delta]:
        """Send it and wait for its answer."""
        return self.submit(harness, session_id, **flags).wait()


Start = Callable[..., EngineHarness]
Alone = Callable[..., list[str]]


def check_hardships_change_nothing(
    start: Start, quiet: EngineHarness, asked: Mapping[str, Mapping[str, Any]]
) -> None:
    """A failed step and blocks that are too few for all: each answer is what it is alone.

    Args:
        start: starts the engine that has both.
        quiet: one that has neither.
        asked: by session, its sampling parameters.
    """
    expected = {}
    for name, sampling in asked.items():
        quiet.restart()
        expected[name] = quiet.ask(name, f"{name}?", start=True, **sampling)[0]
    harness = start(blocks=30, prefill_chunk_tokens=16)
    with harness.failing_step(turns=2) as step:
        turns = {
            name: harness.submit(name, f"{name}?", start=True, **sampling)
            for name, sampling in asked.items()
        }
        assert {name: turn.wait()[0] for name, turn in turns.items()} == expected
    assert step.turns >= 2
    now = harness.engine.statistics()
    assert now.turns_failed == 0
    assert now.restored_from_host + now.restored_by_computing > 0


def failure(pending: Pending) -> ErrorCode:
    with pytest.raises(SessionError) as caught:
        pending.wait()
    return caught.value.code


def resident(harness: EngineHarness) -> set[SessionId]:
    """Sessions that hold blocks."""

    def look(state: EngineState) -> set[SessionId]:
        return {each.id for each in state.sessions.oldest_first() if each.key_values.blocks}

    return harness.inspect(look)


def on_host(harness: EngineHarness) -> set[SessionId]:
    """Sessions whose keys and values lie in host memory."""

    def look(state: EngineState) -> set[SessionId]:
        return {each.id for each in state.sessions.oldest_first() if each.key_values.host}

    return harness.inspect(look)


def blocks_of(final: Delta) -> int:
    """Blocks that a conversation fills up to the end of an answer."""
    return -(-(final.num_input_tokens + final.num_output_tokens) // BLOCK_TOKENS)


def long_ask(word: str) -> Ask:
    """Its conversation begins like no other word's, and words of one token make it as long."""
    return Ask(f"{word} " * 40, max_tokens=9, ignore_eos=True)


def show(number: int) -> Ask:
    return Ask("What is it?", (PICTURES[number],), max_tokens=8)
