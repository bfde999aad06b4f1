"""`make profile`, in a short form, against the server of the test session."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from benchmarks.perf_analyzer import Turn
from benchmarks.profile import summarize
from llava_triton.server.triton_server import TritonServer
from tests.conftest import ROOT


def test_profile_measures_whole_sessions_over_both_protocols(
    server: TritonServer, tmp_path: Path
) -> None:
    output = tmp_path / "profile of a test"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.profile"),
            *("--http-address", server.http_address, "--grpc-address", server.grpc_address),
            *("--concurrency", "1", "2", "--sessions", "2", "--output", str(output)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "report.md").read_text().count("llava_stream |") == 2
    with (output / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["sessions_at_once"]) for row in rows] == [
        ("llava", "1"),
        ("llava", "2"),
        ("llava_stream", "1"),
        ("llava_stream", "2"),
    ]
    for row in rows:
        # Two sessions of four turns for each one at a time: none was refused or left out.
        assert int(row["turns"]) >= 8 * int(row["sessions_at_once"])
        assert float(row["later_whole_p50"]) >= float(row["later_first_response_p50"]) > 0


def test_summary_keeps_opening_and_later_turns_apart() -> None:
    turns = [
        Turn(opening=True, sent=0.0, responses=(0.5, 1.0)),
        Turn(opening=False, sent=1.0, responses=(1.1, 1.4)),
        Turn(opening=False, sent=1.4, responses=(1.6, 2.0)),
    ]
    row = summarize("llava_stream", "gRPC", 1, turns)
    assert row.turns_per_second == 1.5
    assert row.opening_first_response_p50 == 500.0
    assert row.later_first_response_p50 == 150.0
    assert row.later_whole_p50 == 500.0
