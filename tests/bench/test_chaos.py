"""`make chaos` in its short form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_no_session_is_lost_whatever_dies(tmp_path: Path) -> None:
    output = tmp_path / "chaos of a test.json"
    command = [sys.executable, "-m", "benchmarks.chaos", "--minutes", "2", "--no-sweep"]
    command += ["--repository", str(tmp_path / "repository"), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert output.exists(), done.stdout + done.stderr
    found = json.loads(output.read_text())
    # How many there is time for depends on how fast the machine starts a server again.
    assert sum(found["faults"].values()) >= 2, done.stdout
    assert all(found["verdict"].values()), done.stdout
