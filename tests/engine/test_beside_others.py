"""An answer does not depend on what is computed beside it, in each precision that promises so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Ask

PRECISIONS = [
    ("float32", "unrounded"),
    ("bfloat16", "unrounded"),
    ("float32", "int8"),
    ("float32", "int4"),
    ("bfloat16", "int4"),
]
"""8-bit weights with bfloat16 do not: docs/architecture.md."""
SESSIONS = 6
TURNS = 3


def ask(session: int, turn: int) -> Ask:
    """Each session has pictures, questions and answers of lengths of its own."""
    words = "and what of the circle on the left " * (1 + (session + turn) % 3)
    images = (PICTURES[session],) if turn == session % 2 else ()
    return Ask(f"{session} {words}", images, 10 + 3 * session + 7 * turn, ignore_eos=True)


@pytest.mark.parametrize(("dtype", "weights"), PRECISIONS)
def test_sessions_answer_alone_as_beside_others(checkpoint: Path, dtype: str, weights: str) -> None:
    harness = EngineHarness(checkpoint, dtype=dtype, weights=weights)
    try:
        alone = {}
        for session in range(SESSIONS):
            for turn in range(TURNS):
                ask(session, turn).wait(harness, session + 1, start=turn == 0)
            alone[session] = harness.history(session + 1)
        harness.restart()
        for turn in range(TURNS):
            pending = [
                ask(session, turn).submit(harness, session + 1, start=turn == 0)
                for session in range(SESSIONS)
            ]
            for each in pending:
                each.wait()
        beside = {session: harness.history(session + 1) for session in range(SESSIONS)}
        assert beside == alone
    finally:
        harness.shutdown()
