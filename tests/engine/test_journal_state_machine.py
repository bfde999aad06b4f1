"""The engine under random operations, with a journal: now and then the server is lost."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis.stateful import rule, run_state_machine_as_test

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.operations import Operation
from llava_triton.engine import Engine
from llava_triton.engine.session import SessionId
from tests.engine.test_engine_state_machine import HANG_SECONDS, EngineMachine, tight_and_quiet
from tests.engine_harness import EngineHarness
from tests.properties import settings
from tests.session_rules import IDLE_SECONDS, Open, Oracle

EXAMPLES = 12
STEPS = 30


class JournaledMachine(EngineMachine):
    """As its parent; what is open survives what happens to the engine."""

    @rule()
    def lose_the_server(self) -> None:
        self._drain()
        self._failed = True
        for session_id in self._sessions:
            log = self._harness.session(session_id).log
            assert log is not None
            until = time.monotonic() + HANG_SECONDS
            while not log.is_safe:
                assert time.monotonic() < until, "a session is not written"
                time.sleep(0.001)
        self._harness.restart()
        self._completed = self._failures = self._cancelled = self._cancelled_ends = 0
        for session_id, session in list(self._sessions.items()):
            self._resume(session_id, session)
        self._failed = False

    def _resume(self, session_id: SessionId, session: Open) -> None:
        asked = self._harness.submit(
            session_id, start=True, tenant=session.tenant, operation=Operation(resume=True)
        )
        event = asked.events.get(timeout=HANG_SECONDS)  # its only one
        if not isinstance(event, SessionError):
            self._completed += 1
            session.used_at = self._clock.now
            return
        assert event.code is ErrorCode.NOT_FOUND
        # It was used since its last record, by turns that failed.
        journal = self._harness.journal
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "wall", lambda: 0.0)  # before it expired
            found = journal.read(session_id, session.tenant)
        assert found is not None
        assert found.last.expires_at <= self._clock.now < session.used_at + IDLE_SECONDS
        del self._sessions[session_id]
        self._failures += 1


@pytest.fixture
def engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[EngineHarness, EngineHarness]]:
    """One with a journal, and a quiet one without."""
    # The rules say that a session too many is refused.
    monkeypatch.setattr(Engine, "_make_room", lambda *_: None)
    journal = (tmp_path / "journal").as_uri()
    with tight_and_quiet(tmp_path, monkeypatch, journal=journal) as (tight, quiet):
        tight.wall = tight.clock
        yield tight, quiet


def test_random_operations_and_losses(
    engines: tuple[EngineHarness, EngineHarness], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "llava_triton")  # the device fails on purpose
    tight, quiet = engines
    machine: Any = functools.partial(JournaledMachine, tight, Oracle(quiet))
    run_state_machine_as_test(
        machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
    )
