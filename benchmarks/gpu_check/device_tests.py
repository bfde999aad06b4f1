"""A stage of `make gpu-check`: the tests that need the device, by pytest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from xml.etree import ElementTree

from benchmarks.gpu_check.pythons import ROOT
from benchmarks.gpu_check.stage import Options, run_stage

BY_THEMSELVES = ["tests/test_gpu_attention.py", "tests/test_on_gpu.py"]
"""They need nothing of conftest.py, which needs Triton's client."""
WITH_FIXTURES = ["tests/test_recorded_decode.py"]


def measure(options: Options) -> None:
    """The stage."""
    findings = options.findings
    chosen = [*BY_THEMSELVES, *WITH_FIXTURES]
    more: list[str] = []
    if options.place.device.type == "cpu":
        chosen = ["tests/test_on_gpu.py"]  # the others run anyhow where there is no GPU
    if importlib.util.find_spec("tritonclient") is None:
        chosen, more = [each for each in chosen if each in BY_THEMSELVES], ["--noconftest"]
        findings.leave_out("tests with fixtures", f"without tritonclient: {WITH_FIXTURES}")
    results = options.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more, *chosen]
    code = subprocess.run([*command, f"--junitxml={results}"], cwd=ROOT, check=False).returncode
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    findings.add("passed", passed, f"{passed} tests passed")
    findings.add("skipped", counts["skipped"], f"{counts['skipped']} were skipped")
    if code != 0:
        findings.fault(f"{bad} tests failed (pytest's exit status {code})")


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
