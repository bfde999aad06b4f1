"""The three steps of `make gpu-check` (STEP=1, 2, 3): what only a GPU can show, without a network.

Three commands of less than ten minutes. Stages run one after the other, each in a process and with
a time limit of its own, and the report is written anew after each: what is cut off leaves what was
found before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.findings import ROOT, commit
from benchmarks.gpu_check.pythons import NO_GPU, Pythons, WheelsError
from benchmarks.gpu_check.report import FILE_NAME, Outcome, Report
from benchmarks.gpu_check.stage import MISTRAL, PARAMETERS, SEVEN, read_findings

SECONDS = 560.0
"""For a step: ten minutes less what starting and copying the results take."""
LEAST_SECONDS = 15.0
"""A stage that has less left is not begun."""
CPU_PATIENCE = 4.0
"""Times a stage's limit, where there is no GPU: nothing is to be learned from how long it takes."""
TAIL_LINES = 40
"""Of a failed stage's output, in the report."""
NO_DEVICE_CODE = 2


@dataclass(frozen=True)
class Stage:
    """One process of the check."""

    name: str
    title: str
    module: str
    seconds: float
    """It is ended after so many."""
    geometry: str = ""
    on_server: bool = False
    """Whether it needs Triton."""


STEPS: dict[int, tuple[Stage, ...]] = {
    # No wheels, no checkpoint.
    1: (
        Stage("kernels", "each kernel by itself, and its parameters", "kernels", 200),
        Stage("step", f"whole steps of random weights, {SEVEN}", "synthetic", 130, SEVEN),
        Stage("tests", "tests of the kernels and of graphs", "device_tests", 170),
        Stage("ncu", "NVIDIA's profiler on two kernels", "ncu", 80),
    ),
    # With wheels; the checkpoint is written once, and stays for step 3.
    2: (
        Stage("prepare", "checkpoint and repository", "prepare", 240, SEVEN),
        Stage("rows", f"the engine's speed, {SEVEN}", "rows", 100, SEVEN),
        Stage("triton", f"through Triton, {SEVEN}", "through_triton", 150, SEVEN, on_server=True),
        Stage("openings", f"openings on pictures, {SEVEN}", "openings", 60, SEVEN),
        Stage(
            "memory", f"sessions that left and came back, {SEVEN}", "return_from_host", 60, SEVEN
        ),
    ),
    3: (
        Stage("prepare", "checkpoint, if it is missing", "prepare_again", 200, SEVEN),
        Stage("agreement", "answers beside transformers'", "agreement", 160, SEVEN),
        Stage("engine-tests", "tests of the engine on the device", "engine_tests", 120),
        Stage("open", f"open sessions, {SEVEN}", "open_sessions", 120, SEVEN),
        Stage("rows-int8", f"8-bit weights, {SEVEN}", "rows_int8", 60, SEVEN),
        Stage("rows-again", f"the engine's speed once more, {SEVEN}", "rows", 80, SEVEN),
        Stage("prepare-mistral", "the other checkpoint", "prepare", 90, MISTRAL),
        Stage("rows-mistral", f"the engine's speed, {MISTRAL}", "rows", 80, MISTRAL),
        Stage("baselines", f"transformers, {SEVEN}", "baselines", 90, SEVEN),
    ),
}
"""The most wanted first: whatever the deadline leaves out is at the end."""


class Check:
    """One run.

    Args:
        folder: for checkpoints, repositories and findings.
        pythons: what the stages run in.
        report: where outcomes go.
        cpu: a tiny model on the CPU.
        ends_at: by `time.monotonic`.
    """

    def __init__(
        self, folder: Path, pythons: Pythons, report: Report, *, cpu: bool, ends_at: float
    ) -> None:
        self._folder = folder
        self._pythons = pythons
        self._report = report
        self._cpu = cpu
        self._ends_at = ends_at
        self._running: set[subprocess.Popen[str]] = set()
        self.parameters = report.file.with_name(PARAMETERS)
        """Of the kernels: what step 1 chose, and the others take."""
        self.stopped = False
        """Whether `stop` was called."""

    def run(self, stages: Sequence[Stage], no_server: str | None) -> None:
        """All stages in their order; after `stop` those that run are reported and no other begins.

        Not for the main thread, where a signal's handler calls `stop`: it could fall between a
        process' start and its being known here, and the process would outlive the check.

        Args:
            stages: to be run.
            no_server: why no Triton server can run, if so.
        """
        for stage in stages:
            if self.stopped:
                return
            if stage.on_server and no_server is not None:
                why = no_server
                self._report.add(Outcome(stage.name, stage.title, "not run", 0.0, why=why))
            else:
                self._run(stage)

    def stop(self) -> None:
        """End what still runs, so that `run` returns; from any thread, and signal handlers."""
        self.stopped = True
        for process in list(self._running):
            _kill(process)

    def _run(self, stage: Stage) -> None:
        began = time.monotonic()
        left = self._ends_at - began
        outcome = Outcome(stage.name, stage.title, "not run", 0.0)
        if left < LEAST_SECONDS:
            why = "the time of the whole check was used up"
            self._report.add(replace(outcome, why=why))
            return
        limit = min(stage.seconds * (CPU_PATIENCE if self._cpu else 1.0), left)
        print(f"--- {stage.name}: {stage.title} (at most {limit:.0f} s)", flush=True)
        findings = self._folder / f"findings-{stage.name}.json"
        findings.unlink(missing_ok=True)  # of an earlier run in this folder
        lines: list[str] = []
        code = self._process(stage, findings, limit, lines)
        found = read_findings(findings)
        outcome = replace(outcome, seconds=time.monotonic() - began, **found)
        if code == 0:
            outcome = replace(outcome, result="passed")
        elif self.stopped:
            outcome = replace(outcome, result="cut off", why="the check was stopped")
        elif code is None:
            outcome = replace(outcome, result="cut off", why=f"it took more than {limit:.0f} s")
        else:
            why = "; ".join(found["faults"]) or f"it ended with exit status {code}"
            outcome = replace(outcome, result="failed", why=why)
        if code != 0:
            outcome = replace(outcome, output_end=lines[-TAIL_LINES:])
        print(f"--- {outcome.name}: {outcome.result} after {outcome.seconds:.1f} s", flush=True)
        self._report.add(outcome)
        self._keep_parameters()

    def _keep_parameters(self) -> None:
        """Beside the report, where the next steps find them."""
        found = self._folder / PARAMETERS
        if found.exists():
            self.parameters.parent.mkdir(parents=True, exist_ok=True)
            self.parameters.write_text(found.read_text())

    def _chosen(self, stage: Stage) -> dict[str, str]:
        """The environment that names the kernels' parameters."""
        if stage.name == "kernels" or not self.parameters.exists():
            return {}
        return {"LLAVA_GPU_PARAMETERS": str(self.parameters.resolve())}

    def _process(self, stage: Stage, findings: Path, limit: float, lines: list[str]) -> int | None:
        """Exit status (None: cut off); the output is appended to `lines`."""
        python = self._pythons.server if stage.on_server else self._pythons.plain
        command = [str(python), "-m", f"benchmarks.gpu_check.{stage.module}"]
        command += ["--folder", str(self._folder), "--findings", str(findings)]
        command += ["--geometry", stage.geometry] if stage.geometry else []
        command += ["--cpu"] if self._cpu else []
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment() | (NO_GPU if self._cpu else {}) | self._chosen(stage),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.add(process)
        if self.stopped:  # since `stop` looked
            _kill(process)
        reader = threading.Thread(target=_show, args=(process, stage.name, lines), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)
            process.wait()
            self._running.discard(process)
        reader.join(5.0)  # a grandchild may keep the pipe open
        return code


def _kill(process: subprocess.Popen[str]) -> None:
    """With its children; a Triton server has a guard in a session of its own, which notices."""
    with contextlib.suppress(ProcessLookupError):  # they have all ended
        os.killpg(process.pid, signal.SIGKILL)


def _show(process: subprocess.Popen[str], name: str, lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        print(f"[{name}] {line}", end="", flush=True)


def _environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return clean | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def ask_machine(python: Path) -> dict[str, Any]:
    """What `benchmarks.gpu_check.machine` says, in the environment of the stages."""
    done = subprocess.run(
        [str(python), "-m", "benchmarks.gpu_check.machine"],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"error: {sys.executable} cannot tell what this machine has; it needs torch:\n"
            f"{done.stderr[-2000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def server_problem(machine: dict[str, Any], wheels: Path) -> str | None:
    """Why no Triton server can run here, in a sentence's end; None where one can."""
    missing = [
        name for name in ("nvidia-pytriton", "tritonclient") if not machine["versions"][name]
    ]
    if missing:
        return f"{' and '.join(missing)} missing: no wheel of it in {wheels} (make gpu-wheels)"
    if not machine["libpython"]:
        return "this machine has no libpython of its Python, which Triton's Python backend loads"
    return None


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        0 where every chosen stage passed, 1 where one did not, 2 without a GPU or for arguments
        that make no sense.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU: tests this")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--step", type=int, choices=list(STEPS), required=True)
    parser.add_argument(
        "--scratch", type=Path, help="folder for checkpoints: steps 2 and 3 share one; it stays"
    )
    parser.add_argument("--stages", nargs="+", help="of the step; all by default")
    options = parser.parse_args(arguments)
    stages = STEPS[options.step]
    names = [stage.name for stage in stages]
    if unknown := [name for name in options.stages or [] if name not in names]:
        parser.error(f"step {options.step} has no stage {unknown[0]}; it has {', '.join(names)}")
    # What makes a checkpoint goes along.
    chosen = [
        stage
        for stage in stages
        if not options.stages or stage.name in options.stages or stage.name.startswith("prepare")
    ]
    earlier = options.output / FILE_NAME.format(step=options.step)
    if len(chosen) < len(stages) and earlier.exists():
        parser.error(f"some stages' report would replace {earlier}; name another --output")
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="llava-gpu-check-") as scratch:
        folder = Path(scratch)
        shared = options.scratch or folder
        shared.mkdir(parents=True, exist_ok=True)
        try:
            pythons = Pythons(folder, options.wheels)
        except WheelsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        machine = ask_machine(pythons.server)
        if machine["device"] is None and not options.cpu:
            print(
                "error: torch finds no NVIDIA GPU on this machine; run this where there is one "
                "(--cpu tests the command itself with a tiny model)",
                file=sys.stderr,
            )
            return NO_DEVICE_CODE
        now = datetime.now(UTC).isoformat(timespec="seconds")
        facts = machine | {"date": now, "commit": commit(), "wheels": pythons.wheels}
        report = Report(options.output, options.step, facts, cpu=options.cpu, stages=tuple(names))
        check = Check(shared, pythons, report, cpu=options.cpu, ends_at=began + options.seconds)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: check.stop())
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(check.run, chosen, server_problem(machine, options.wheels))
            while not run.done():  # a signal just before a wait is handled only after it
                wait([run], timeout=0.5)
            run.result()
        if check.stopped:
            print(f"stopped; what was found is in {report.file}", file=sys.stderr)
            return 1
    print(f"\n{report.text()}\nwritten to {report.file} and {report.file.with_suffix('.txt').name}")
    return 0 if report.passed(stage.name for stage in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
