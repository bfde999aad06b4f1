"""A stage of `make gpu-check`: the tests of the engine on the device, by pytest."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.device_tests import run_tests
from benchmarks.gpu_check.stage import Options, run_stage


def measure(options: Options) -> None:
    """The stage."""
    run_tests(options, ["tests/engine/test_on_gpu.py"], [])


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
