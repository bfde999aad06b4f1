"""A stage of `make gpu-check`: decode steps with weights rounded to 8-bit integers."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.rows import engine_rows
from benchmarks.gpu_check.stage import Options, read_findings, run_stage


def measure(options: Options) -> None:
    """The stage. The memory's limit is that of float weights: the report shows the gain alone."""
    rows, way = engine_rows(options, weights="int8")
    rows.measure(rows.warm_up, rows.decode_one, rows.decode_many)
    way.close()
    floats = read_findings(options.folder / "findings-rows.json")["values"]
    many = options.place.sizes.many_sessions
    for name, told in (
        ("decode_one_ms", "decode, 1 session"),
        ("decode_many_tokens_per_second", f"decode, {many} sessions"),
    ):
        rounded, unrounded = options.findings.values.get(name), floats.get(name)
        if rounded is None or unrounded is None:
            options.findings.leave_out(f"{name}_gain", "stage rows or this one has not measured it")
            continue
        gain = unrounded / rounded if name.endswith("_ms") else rounded / unrounded
        options.findings.add(f"{name}_gain", gain, f"{told}: {gain:.2f} times as fast")


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
