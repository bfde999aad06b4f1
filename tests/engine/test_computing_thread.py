"""One thread of the engine's process computes on several cores, and it alone has OpenMP workers.

With more of them than cores OpenMP lets none wait spinning, and every layer of every step is slept
through and woken up for several times.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import sys
import threading
import time
from pathlib import Path

import torch

from llava_triton.model import runner as model_runner
from tests.engine_harness import EngineHarness

CORES = 2


def workers():  # the fewest in a while: a thread that has ended is a task a little longer
    counts = []
    for _ in range(50):
        counts.append(len(os.listdir("/proc/self/task")) - threading.active_count() - others)
        time.sleep(0.01)
    return min(counts)


def compute():  # as an image's features are copied, on the thread that takes a request
    torch.ones(1 << 22).add_(1.0)


def answer():
    harness = EngineHarness(Path(sys.argv[1]))
    harness.ask("session", "What is it? " * 200, start=True, end=True)
    return harness


torch.set_num_threads(1)
others = 0
answer().shutdown()  # tokenizers and others have threads of their own
others = workers()
torch.set_num_threads(CORES)
compute()
print("loading:", workers())
model_runner.SMALL_MODEL_PARAMETERS = 0
os.sched_getaffinity = lambda process: range(CORES)
harness = answer()
print("answering:", workers())
compute()
print("answering, beside another thread:", workers())
harness.shutdown()
"""


def test_only_the_device_s_thread_has_workers(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "loading: 1",
        "answering: 1",
        "answering, beside another thread: 1",
    ]
