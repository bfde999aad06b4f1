"""`make bench`: our engine beside transformers' `generate`, on one machine, in one run.

Whole sessions of one shape (a picture and a question, then questions; answers of one length) are
held in several ways, each in processes of its own. The ways take turns over several rounds, because
a machine gets slower and faster by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks import findings
from benchmarks.distance import Ceiling, distance_text, distances
from benchmarks.export import ExportFailedError, export
from benchmarks.growth import Point, growth_text, read_points
from benchmarks.limits import Limits, best_of, read_limits
from benchmarks.load import Load, read_loads
from benchmarks.processes import OtherPrograms
from benchmarks.report import CPU_TARGETS, GPU_TARGETS, Rounds, report, rows
from benchmarks.workload import GEOMETRIES, Workload
from llava_triton.device import compute_dtype, default_device
from llava_triton.server.triton_server import CPU_ENVIRONMENT

LARGE_LOAD = 16
"""Loads of more sessions are measured in the first round only: they take minutes."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of answering, as `benchmarks.part` makes it."""

    title: str
    kind: str
    """`engine`, `triton` or `transformers`."""
    options: tuple[str, ...] = ()
    dtype: str = "float32"
    every_round: bool = True
    """Else in the first round only."""

    weights: str = "unrounded"
    """The engine's `Settings.weights`."""

    @property
    def ours(self) -> bool:
        """Whether our engine answers, which can answer several sessions at once."""
        return self.kind != "transformers"


WAYS = {
    "S": Contender("transformers, stateless", "transformers", every_round=False),
    "K": Contender("transformers, kept cache", "transformers", ("--kept",)),
    "E": Contender("engine", "engine"),
    "T": Contender("engine in Triton", "triton"),
    "E16": Contender("engine, bfloat16", "engine", dtype="bfloat16"),
    "T16": Contender("engine in Triton, bfloat16", "triton", dtype="bfloat16"),
    "E8": Contender("engine, bfloat16, int8 weights", "engine", dtype="bfloat16", weights="int8"),
    "E4": Contender("engine, bfloat16, int4 weights", "engine", dtype="bfloat16", weights="int4"),
}
DEFAULT_WAYS = ("S", "K", "E", "T", "E16", "E8", "E4")


def ways_on(device: torch.device) -> dict[str, Contender]:
    """The ways by their names; on a GPU all of them compute in its own half type."""
    if device.type == "cpu":
        return WAYS
    dtype = str(compute_dtype("auto", device)).removeprefix("torch.")
    return {
        name: dataclasses.replace(way, dtype=dtype)
        for name, way in WAYS.items()
        if way.dtype == "float32" or way.weights != "unrounded"
    }


def environment(way: Contender) -> dict[str, str]:
    """The environment of a way's processes: OpenMP as the server sets it for our engine, as OpenMP
    itself would have it for transformers."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    if way.kind == "engine":
        clean |= CPU_ENVIRONMENT
    return clean


class Bench:
    """A run of the benchmark.

    Args:
        folder: for checkpoints, repositories and what the parts write.
        sessions: numbers of sessions at once, ascending.
        quick: short sessions, and all ways side by side.
        geometry: a key of `GEOMETRIES`; None: the one for this machine.
    """

    def __init__(
        self, folder: Path, sessions: Sequence[int], *, quick: bool, geometry: str | None = None
    ) -> None:
        self._folder = folder
        self._sessions = sorted(sessions)
        self._quick = quick
        self._device = default_device()
        self._ways = ways_on(self._device)
        usual = "cpu" if self._device.type == "cpu" else "llava-1.5-7b"
        self._geometry = geometry or ("quick" if quick else usual)
        self._began = time.monotonic()
        self._repositories: dict[str, Path] = {}
        self.checkpoint = folder / "checkpoint"
        """Where `prepare` writes it."""
        self._limits: list[dict[str, Limits]] = []
        self.fairness: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """By the way's name: fields of `Fairness`, for each round."""
        self.growth: dict[str, list[Point]] = {}
        """By the way's name."""
        self.disturbances: list[tuple[str, float]] = []
        """Every part's name, and the share of the machine that other programs used meanwhile."""

    def prepare(self, ways: Sequence[str]) -> None:
        """Write the checkpoint and export it, once for each dtype."""
        self._say(f"writing a checkpoint with random weights ({self._geometry})")
        # In a process of its own, as everything that uses a GPU: its memory is free afterwards.
        written = ["-m", "benchmarks.workload", "--geometry", self._geometry]
        self._run([*written, "--output", str(self.checkpoint)], dict(os.environ))
        for dtype in sorted({self._ways[name].dtype for name in ways if self._ways[name].ours}):
            self._say(f"exporting it for {dtype}")
            self._repositories[dtype] = self._folder / f"served-{dtype}"
            export(self.checkpoint, self._repositories[dtype], {"dtype": dtype})

    def ceiling(self) -> Ceiling:
        """What the hardware allows the checkpoint: the best rates of all rounds; after `measure`.

        A machine whose memory is slow for a minute has not got another limit.
        """
        best = {dtype: best_of([each[dtype] for each in self._limits]) for dtype in self._limits[0]}
        return Ceiling(AutoConfig.from_pretrained(self.checkpoint), best)

    def _measure_limits(self, ways: Sequence[str], number: int) -> None:
        self._say(f"round {number + 1}: what the hardware allows")
        dtypes = set(self.dtypes(ways).values())
        if self._device.type == "cpu":
            dtypes.add("float32")  # the vision encoder's
        output = self._folder / f"limits-{number}.json"
        command = ["-m", "benchmarks.limits", "--dtypes", *sorted(dtypes), "--output", str(output)]
        others = OtherPrograms()
        self._run(command, os.environ | CPU_ENVIRONMENT)
        self._note(f"the limits in round {number + 1}", others)
        self._limits.append(read_limits(output))

    def about(self, ways: Sequence[str]) -> dict[str, Any]:
        """When, where and with what it runs."""
        return findings.about() | {"geometry": self._geometry, "dtypes": self.dtypes(ways)}

    def titles(self, ways: Sequence[str]) -> dict[str, str]:
        """By the ways' names."""
        return {name: self._ways[name].title for name in ways}

    def dtypes(self, ways: Sequence[str]) -> dict[str, str]:
        """By the ways' names."""
        return {name: self._ways[name].dtype for name in ways}

    def measure(self, ways: Sequence[str], repeats: int) -> Rounds:
        """The hardware's limits and all ways, one after the other, `repeats` times."""
        rounds: Rounds = []
        for number in range(repeats):
            self._measure_limits(ways, number)
            wanted = [name for name in ways if number == 0 or self._ways[name].every_round]
            # One after the other, except where the figures mean nothing and only time is saved.
            with ThreadPoolExecutor(len(ways) if self._quick else 1) as pool:
                loads = pool.map(self._part, wanted, [number] * len(wanted))
                rounds.append(dict(zip(wanted, loads, strict=True)))
        return rounds

    def _part(self, name: str, number: int) -> list[Load]:
        way = self._ways[name]
        sessions = [
            count
            for count in self._sessions
            if (way.ours or count == 1) and (number == 0 or count <= LARGE_LOAD)
        ] or [1]
        self._say(f"round {number + 1}, {name} ({way.title}): {sessions} sessions at once")
        workload = self._folder / f"workload-{name}.json"
        self.workload(name).write(workload)
        output = self._folder / f"loads-{name}-{number}.json"
        command = ["-m", "benchmarks.part", way.kind, *way.options, "--weights", way.weights]
        command += ["--workload", str(workload)]
        command += ["--output", str(output), "--sessions", *(str(count) for count in sessions)]
        fairness = self._folder / f"fairness-{name}-{number}.json"
        if way.kind == "engine":
            command += ["--fairness", str(fairness)]
        others = OtherPrograms()
        self._run(command, environment(way), show=True)
        self._note(f"{name} in round {number + 1}", others)
        if fairness.exists():
            self.fairness[name].append(json.loads(fairness.read_text()))
        if way.kind == "engine" and number == 0:
            self.growth[name] = self._grow(way, workload)
        return read_loads(output)

    def _grow(self, way: Contender, workload: Path) -> list[Point]:
        output = workload.with_name(f"growth-{workload.name}")
        command = ["-m", "benchmarks.growth", "--weights", way.weights, "--workload", str(workload)]
        self._run([*command, "--output", str(output)], environment(way))
        return read_points(output)

    def _note(self, part: str, others: OtherPrograms) -> None:
        if not self._quick:  # where the parts run side by side
            self.disturbances.append((part, others.cores() / (os.cpu_count() or 1)))

    def workload(self, way: str) -> Workload:
        """What a way's processes read; after `prepare`."""
        dtype = self._ways[way].dtype
        repository = self._repositories.get(dtype, Path("none"))
        workload = Workload(str(self.checkpoint), str(repository), dtype)
        if not self._quick:
            return workload
        return dataclasses.replace(
            workload,
            turns=3,
            answer_tokens=8,
            streams=4,
            stream_tokens=400,
            prompt_tokens=500,
            contexts=(100, 300),
            idle_sessions=(1, 50),
        )

    def _run(self, arguments: list[str], variables: dict[str, str], show: bool = False) -> None:
        """Run a part; what it prints is shown as it comes if `show`."""
        with tempfile.TemporaryFile("w+") as complaints:
            part = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=findings.ROOT,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
            assert part.stdout is not None
            for line in part.stdout:
                if show:
                    print(f"{'':11}{line}", end="", flush=True)
            if part.wait() != 0:
                complaints.seek(0)
                raise BenchError(f"{' '.join(arguments)} failed:\n{complaints.read()[-4000:]}")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)


class BenchError(RuntimeError):
    """A part of the benchmark failed; the text holds its output."""


def main(arguments: list[str] | None = None) -> int:
    """Measure; print the tables, write them, every figure as JSON, and plots; see `--help`."""
    options = _options(arguments)
    ways = options.ways
    with tempfile.TemporaryDirectory(prefix="llava-bench-") as folder:
        bench = Bench(
            Path(folder), options.sessions, quick=options.quick, geometry=options.geometry
        )
        try:
            bench.prepare(ways)
            rounds = bench.measure(ways, options.repeats)
            ceiling = bench.ceiling()
        except (BenchError, ExportFailedError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    titles = bench.titles(ways)
    targets = CPU_TARGETS if default_device().type == "cpu" else GPU_TARGETS
    text, values = report(rounds, titles, bench.fairness, bench.disturbances, targets)
    kept = {name: WAYS[name].weights for name in ways}
    far = distances(rows(rounds, titles), bench.dtypes(ways), kept, ceiling)
    about = bench.about(ways)
    values |= {
        "quick": options.quick,
        "growth": {
            way: [dataclasses.asdict(point) for point in points]
            for way, points in bench.growth.items()
        },
        "limits": {dtype: dataclasses.asdict(each) for dtype, each in ceiling.limits.items()},
        "distances": [dataclasses.asdict(each) for each in far],
    }
    text = "\n".join([text, growth_text(bench.growth), distance_text(far, ceiling)])
    findings.write_results(options.output, text, values, about)
    draw_plots(options.output)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    device = default_device()
    ways = list(ways_on(device))
    usual = [name for name in DEFAULT_WAYS if name in ways]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: tests the bench")
    parser.add_argument("--ways", nargs="+", choices=ways, default=usual)
    parser.add_argument(
        "--geometry",
        choices=[name for name in GEOMETRIES if name != "quick"],
        help="size of the model (default: llava-1.5-7b on a GPU, else cpu)",
    )
    parser.add_argument("--sessions", type=int, nargs="+", help="at once (default: 1 4 16 64)")
    parser.add_argument("--repeats", type=int, help="rounds (default: 3)")
    parser.add_argument("--output", type=Path, default=findings.BUILD / "bench.json")
    options = parser.parse_args(arguments)
    options.sessions = options.sessions or ([1, 4] if options.quick else [1, 4, 16, 64])
    options.repeats = options.repeats or (1 if options.quick else 3)
    if min(options.sessions) < 1 or options.repeats < 1:
        parser.error("--sessions and --repeats must be at least 1")
    if options.quick and options.geometry:
        parser.error("--quick has a geometry of its own: leave out --geometry")
    if device.type == "cpu" and options.geometry not in (None, "cpu"):
        parser.error(
            f"--geometry {options.geometry} needs a GPU, and torch sees none; give cpu or none"
        )
    return options


def draw_plots(results: Path) -> None:
    """Beside the JSON that a command wrote, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        # A machine that measures need not have it.
        print(f"no plots: matplotlib is missing; later: python -m benchmarks.plots {results}")
        return
    from benchmarks.plots import draw

    for picture in draw(results):
        print(f"drawn: {picture}")


if __name__ == "__main__":
    sys.exit(main())
