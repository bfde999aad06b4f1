"""`make hostile` in its short form: whatever does not depend on how fast the machine is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TIMES = ("first token", "ping")
"""Faults that are looked at on a quiet machine only."""
MOST_MIB = 300.0
"""That a process may keep of an attack here."""


def test_cheap_attacks_harm_nobody(demo_repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "hostile of a test.json"
    command = [sys.executable, "-m", "benchmarks.hostile", "--quick"]
    command += ["--repository", str(demo_repository), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert output.exists(), done.stdout + done.stderr
    attacks = json.loads(output.read_text())["attacks"]
    assert {"T1", "T3", "T5", "S1", "S5", "S7", "A1", "A3", "A4", "A5", "F4"} <= {
        attack["name"] for attack in attacks
    }
    harmed = {}
    for attack in attacks:
        faults = {kind: what for kind, what in attack["faults"].items() if kind not in TIMES}
        before, after = attack["memory_before_mib"], attack["memory_after_mib"]
        if all(after[part] < before.get(part, 0.0) + MOST_MIB for part in after):
            faults.pop("memory", None)
        if faults:
            harmed[f"{attack['name']} {attack['title']}"] = faults
    assert harmed == {}, done.stdout
