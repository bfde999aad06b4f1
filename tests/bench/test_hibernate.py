"""`benchmarks.hibernate`, in a short form."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.hibernate import SETTINGS, main


def test_more_sessions_than_memory_are_all_answered_rightly(tmp_path: Path) -> None:
    output = tmp_path / "hibernate.json"
    sessions = 3 * int(SETTINGS["max_sessions"])
    assert main(["--sessions", str(sessions), "--asked", "40", "--output", str(output)]) == 0
    values = json.loads(output.read_text())
    assert (values["sessions"], values["asked_again"]) == (sessions, 40)
    assert (values["wrong_or_failed"], values["lost"], values["files_left"]) == (0, 0, 0)
