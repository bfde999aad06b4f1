"""A stage of `make gpu-check`: what step 3 needs, on the machine of step 2 or on a new one."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.export import DEMO, export
from benchmarks.gpu_check.prepare import write
from benchmarks.gpu_check.stage import Options, repository_folder, run_stage


def prepare(options: Options) -> None:
    """The stage: the checkpoint, if it is missing; the demo checkpoint's repository."""
    with ThreadPoolExecutor(1) as pool:  # the export is on the CPU meanwhile
        coming = pool.submit(export, DEMO, repository_folder(options.folder, "demo"), {})
        options.findings.attempt("writing the checkpoint", lambda: write(options))
        options.findings.attempt("exporting the demo checkpoint", coming.result)


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, prepare))
