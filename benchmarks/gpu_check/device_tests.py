"""A stage of `make gpu-check`: the tests that need the device, by pytest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.findings import ROOT
from benchmarks.gpu_check.stage import Options, run_stage

BY_THEMSELVES = ["tests/engine/test_on_gpu.py", "tests/unit/test_gpu_attention.py"]
"""They need nothing of conftest.py, which needs Triton's client."""
WITH_FIXTURES = ["tests/engine/test_decode_graphs.py"]


def measure(options: Options) -> None:
    """The stage."""
    findings = options.findings
    chosen = [*BY_THEMSELVES, *WITH_FIXTURES]
    more: list[str] = []
    if options.place.device.type == "cpu":
        chosen = ["tests/engine/test_on_gpu.py"]  # the others run anyhow where there is no GPU
    if importlib.util.find_spec("tritonclient") is None:
        chosen, more = [each for each in chosen if each in BY_THEMSELVES], ["--noconftest"]
        findings.leave_out("tests with fixtures", f"without tritonclient: {WITH_FIXTURES}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more]
    passed, skipped = 0, 0
    running = {}
    for file in chosen:  # side by side: most of the time they compile kernels
        results = options.folder / f"{Path(file).stem}.xml"
        started = subprocess.Popen([*command, file, f"--junitxml={results}"], cwd=ROOT)
        running[file] = started, results
    for file, (started, results) in running.items():
        status = started.wait()
        if not results.exists():
            findings.fault(f"{file} ended without results (exit status {status})")
            continue
        suite = ElementTree.parse(results).getroot().find("testsuite")
        assert suite is not None
        tests, failures, errors, left = (
            int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        )
        bad = failures + errors
        passed, skipped = passed + tests - bad - left, skipped + left
        findings.add("passed", passed, f"{passed} tests passed, up to those of {file}")
        findings.add("skipped", skipped, f"{skipped} were skipped")
        if status != 0:
            findings.fault(f"{bad} tests failed in {file} (exit status {status})")


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
