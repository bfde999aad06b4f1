"""What the engine's books cost does not grow with what is open, nor with what was said.

Counted in lines of Python that are executed, not in time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import pytest

from llava_triton.contract.settings import Settings
from llava_triton.conversation.prompt import CompletedTurn, Prompt
from llava_triton.engine.block_pool import BlockPool
from llava_triton.engine.image_store import ImageStore
from llava_triton.engine.scheduler import Scheduler
from llava_triton.engine.session import Session, SessionId
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.session_table import SessionTable
from llava_triton.engine.statistics import Statistics
from llava_triton.engine.step_parts import step_part
from llava_triton.engine.turn import QueuedTurn, RunningTurn, TurnRequest
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.step import Choice
from tests.simulated_device import running_turn

SHORT, LONG = 320, 3520
"""Tokens of a conversation, whole blocks."""
FEW, MANY = 100, 10_000
"""Open sessions."""


def operations(action: Callable[[], object]) -> int:
    """How many lines of Python it executes."""
    lines = 0

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # else what other tests have left is finalized here, line by line
    sys.settrace(count)
    try:
        action()
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def test_operations_are_counted() -> None:
    def loop(times: int) -> None:
        for _ in range(times):
            pass

    assert operations(lambda: loop(1000)) > operations(lambda: loop(10)) + 900


class Books:
    """The books of an engine with sessions open, without a device."""

    def __init__(self, idle: int = 0, blocks: int = 1000) -> None:
        self.now = 0.0
        self.pages = cast(Any, None)
        self.memory = SessionMemory(BlockPool(blocks), self.pages, host_bytes=0)
        self.expired: list[SessionId] = []
        self.table = SessionTable(
            self.memory,
            ImageStore(lambda features: features, 0, 0),
            Settings(max_sessions=2 * MANY, session_idle_seconds=100, session_lifetime_seconds=150),
            lambda: self.now,
            Statistics(),
            self.expired.append,
        )
        for number in range(idle):
            self.open(number)

    def open(self, name: SessionId, tokens: int = 0) -> Session:
        """A session with so many computed tokens."""
        session = self.table.make(name, "")
        self.table.open(session)
        session.tokens = [7 + number % 11 for number in range(tokens)]
        if tokens:
            session.turns = [CompletedTurn(tokens, tokens, 0, 0, "yes", 0)]
        assert self.memory.admit(session)
        self.memory.extend(session, tokens - session.key_values.computed)
        self.table.used(name, "")
        return session


@pytest.mark.parametrize("end", ["idle", "lifetime"])
def test_expired_sessions_are_found_among_any_number(end: str) -> None:
    def cost(others: int) -> int:
        books = Books()
        books.open("old")
        for number in range(others):
            books.open(number)
        if end == "idle":
            books.now = 60.0
            for number in range(others):
                books.table.used(number, "")
            books.now = 110.0
        else:
            books.now = 1.0
            for number in range(others):
                books.table.drop(number)
                books.open(number)
            books.now = 90.0
            for name in ["old", *range(others)]:
                books.table.used(name, "")
            books.now = 150.5
        counted = operations(lambda: books.table.expire(active=()))
        assert books.expired == ["old"]
        assert operations(lambda: books.table.expire(active=())) < counted
        return counted

    assert cost(FEW) == cost(MANY)


def test_who_gives_up_blocks_is_found_among_any_number_of_sessions() -> None:
    """All but one have lost theirs already."""

    def cost(others: int) -> int:
        books = Books(idle=others)
        victim = books.open("has blocks", tokens=SHORT)
        books.open("younger", tokens=0)
        scheduler = Scheduler(books.memory, books.memory.on_device, 512, Settings())
        found: list[Session | None] = []
        counted = operations(lambda: found.append(scheduler.victim(())))
        assert found == [victim]
        return counted

    assert cost(FEW) == cost(MANY)


def test_a_step_costs_the_same_however_much_was_said() -> None:
    def cost(tokens: int) -> int:
        books = Books()
        session = books.open("asked", tokens)
        session.tokens += [3, 4]
        turn = running(session, prompt=tokens + 2)
        scheduler = Scheduler(books.memory, lambda: (), 512, Settings())
        (prompt,) = scheduler.plan([turn], now=0.0)
        books.memory.extend(session, prompt.count)
        session.tokens.append(5)

        def step() -> None:
            (work,) = scheduler.plan([turn], now=0.0)
            step_part(work.ids, session, work.tokens_in_flight, Choice())
            scheduler.clock.observe(1, 0, 0.01)
            books.memory.extend(session, work.count)

        return operations(step)

    assert cost(SHORT) == cost(LONG)


def test_a_turn_begins_at_the_same_cost_however_much_was_said() -> None:
    def cost(tokens: int) -> int:
        books = Books()
        session = books.open("asked", tokens)
        message = Prompt([5] * (2 * BLOCK_TOKENS))

        def begin() -> None:
            kept = session.replace_message(message)
            books.memory.truncate(session, min(kept, len(session.tokens) - 1))
            turn = running(session, prompt=len(session.tokens))
            turn.kept = kept
            (work,) = Scheduler(books.memory, lambda: (), 512, Settings()).plan([turn], now=0.0)
            assert work.count == len(message)
            step_part(work.ids, session, work.tokens_in_flight, Choice())
            books.memory.extend(session, work.count)

        return operations(begin)

    assert cost(SHORT) == cost(LONG)


def running(session: Session, prompt: int) -> RunningTurn:
    """A turn of a session that has all its tokens."""
    turn = QueuedTurn(TurnRequest(session.id), lambda _: None)
    return running_turn(turn, session, prompt, answer=100)
