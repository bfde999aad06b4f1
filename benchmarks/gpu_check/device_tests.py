"""A stage of `make gpu-check`: the tests of kernels and graphs on the device, by pytest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.findings import ROOT
from benchmarks.gpu_check.stage import Options, run_stage

BY_THEMSELVES = ["tests/unit/test_gpu_attention.py"]
"""They need nothing of conftest.py, which needs Triton's client."""
WITH_FIXTURES = ["tests/engine/test_decode_graphs.py"]


def measure(options: Options) -> None:
    """The stage. (Where there is no GPU, these tests run anyhow, and are not run once more.)"""
    if options.place.device.type == "cpu":
        options.findings.add("passed", 0, "without a GPU there is nothing to run here")
    else:
        run_tests(options, BY_THEMSELVES, WITH_FIXTURES)


def run_tests(options: Options, by_themselves: Sequence[str], with_fixtures: Sequence[str]) -> None:
    """Run files of tests, and count what passed.

    Args:
        options: of the stage.
        by_themselves: files that need nothing of conftest.py.
        with_fixtures: files that do; left out where conftest.py cannot be imported.
    """
    findings = options.findings
    chosen = [*by_themselves, *with_fixtures]
    more: list[str] = []
    if importlib.util.find_spec("tritonclient") is None:
        chosen, more = [*by_themselves], ["--noconftest"]
        if with_fixtures:
            why = f"without tritonclient: {', '.join(with_fixtures)}"
            findings.leave_out("tests with fixtures", why)
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
