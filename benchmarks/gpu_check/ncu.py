"""A stage of `make gpu-check`: NVIDIA's profiler on the two kernels that matter, where it is there.

It starts this module once more, which launches them a few times.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.findings import ROOT
from benchmarks.gpu_check.stage import Options, run_stage

LAUNCHING = "LLAVA_GPU_CHECK_LAUNCHES"
KERNELS = "attend_one|gemv|gemm|cutlass|nvjet"
"""Attention in decoding, and whatever the library takes for one row's product."""
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
SECONDS = 60.0
MOST_LINES = 160


def launch() -> None:
    """A product of one row, and attention of one long sequence."""
    from torch.nn import functional

    from benchmarks.gpu_check.kernels import SEVEN_BILLION
    from llava_triton.kernels.base import Rows
    from llava_triton.kernels.gpu.attention import GpuAttention

    geometry, device, dtype = SEVEN_BILLION.geometry, torch.device("cuda"), torch.bfloat16
    weight = torch.randn(2 * SEVEN_BILLION.inner, SEVEN_BILLION.width, device=device, dtype=dtype)
    x = torch.randn(1, SEVEN_BILLION.width, device=device, dtype=dtype)
    pages = torch.randn(64, geometry.kv_heads, 16, geometry.head_dim, device=device, dtype=dtype)
    qkv = torch.randn(1, geometry.qkv_width, device=device, dtype=dtype)
    integers = torch.tensor([0, 1], dtype=torch.int32, device=device)
    context = torch.tensor([999], dtype=torch.int32, device=device)
    table = torch.arange(64, dtype=torch.int32, device=device)[None].contiguous()
    rows = Rows(integers, context, table, context.long())
    for _ in range(3):
        functional.linear(x, weight)
        GpuAttention(geometry).attend(qkv, pages, pages, rows)
    torch.cuda.synchronize()


def measure(options: Options) -> None:
    """The stage."""
    program = shutil.which("ncu")
    if program is None or options.place.device.type != "cuda":
        why = "there is no ncu on this machine" if program is None else "this is no GPU"
        options.findings.leave_out("ncu", why)
        return
    report = Path(options.folder) / "ncu.txt"
    command = [program, "--kernel-name", f"regex:{KERNELS}", "--launch-skip", "2"]
    command += ["--launch-count", "4", "--log-file", str(report)]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.gpu_check.ncu"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {LAUNCHING: "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    told = report.read_text(errors="replace") if report.exists() else done.stdout + done.stderr
    lines = told.splitlines()[:MOST_LINES]
    if done.returncode != 0:  # a user without the right to read the GPU's counters, most often
        options.findings.leave_out("ncu", f"it ended with {done.returncode}: {lines[-1:]}")
        return
    options.findings.add("ncu", lines, "\n".join(lines))


if __name__ == "__main__":
    if os.environ.get(LAUNCHING):
        launch()
        sys.exit(0)
    sys.exit(run_stage(__doc__, measure))
