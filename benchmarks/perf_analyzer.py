"""NVIDIA's perf_analyzer: getting its binary, and driving whole sessions with it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The last client wheel whose binary runs with Debian 12's C library, and the CUDA runtime that
# it is linked to (it needs no GPU). They are not installed: only files inside them are wanted.
WHEELS = ("tritonclient==2.51.0", "nvidia-cuda-runtime-cu12==12.9.79")


class PerfAnalyzerError(RuntimeError):
    """perf_analyzer could not be had or failed; the text holds its output."""


@dataclass(frozen=True)
class Turn:
    """One turn as the client saw it; times in seconds."""

    opening: bool
    """Whether it is its session's first, the one with the picture."""
    sent: float
    responses: tuple[float, ...]
    """When each response came: one a piece of the answer if it was streamed."""

    @property
    def first_response(self) -> float:
        """Seconds from sending to the first response."""
        return self.responses[0] - self.sent

    @property
    def whole(self) -> float:
        """Seconds from sending to the last response."""
        return self.responses[-1] - self.sent


class PerfAnalyzer:
    """The unpacked binary.

    Args:
        folder: where it is unpacked, once; downloads about 17 MB the first time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / "complete").exists():
            self._unpack()
        self._binary = next(folder.glob("unpacked/*.data/data/bin/perf_analyzer"))
        self._binary.chmod(0o755)
        runtime = next(folder.glob("unpacked/nvidia/cuda_runtime/lib/libcudart.so.12"))
        inherited = os.environ.get("LD_LIBRARY_PATH")
        search = [str(runtime.parent.resolve()), *([inherited] if inherited else [])]
        self._environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(search)}

    def _unpack(self) -> None:
        wheels = self._folder / "wheels"
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
        done = subprocess.run([*download, *WHEELS], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PerfAnalyzerError(f"downloading {' and '.join(WHEELS)} failed:\n{done.stderr}")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self._folder / "unpacked")
        (self._folder / "complete").touch()

    def run(
        self,
        model: str,
        address: str,
        data: Path,
        *,
        streaming: bool,
        concurrency: int,
        requests: int,
        raw: Path,
    ) -> list[Turn]:
        """Drive `concurrency` sessions at a time until `requests` turns are done.

        Args:
            model: `llava` over HTTP, or `llava_stream` over gRPC with `streaming`.
            address: `host:port` of that protocol.
            data: what `write_sessions` wrote.
            raw: folder for perf_analyzer's own report (CSV) and record of every turn (JSON).

        Raises:
            PerfAnalyzerError: it failed, or a turn did.
        """
        raw.mkdir(parents=True, exist_ok=True)
        record = raw / f"{model}-{concurrency}.json"
        record.unlink(missing_ok=True)  # perf_analyzer refuses to write over it
        options = {
            "-m": model,
            "-u": address,
            "-i": "grpc" if streaming else "http",
            "--input-data": str(data),
            "--concurrency-range": f"{concurrency}:{concurrency}",
            "--request-count": str(requests),
            # Far above what the tests and examples use by hand.
            "--sequence-id-range": "1000000:2000000",
            "-f": str(raw / f"{model}-{concurrency}.csv"),
            "--profile-export-file": str(record),
        }
        if not streaming:
            # `llava` calls the model that has the sessions from inside another: without being
            # told, perf_analyzer takes it for stateless.
            options["--bls-composing-models"] = "language_model"
        command = [str(self._binary), *(part for pair in options.items() for part in pair)]
        command.append("--serial-sequences")  # a person asks when the last answer is there
        if streaming:
            command.append("--streaming")
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            output = (done.stdout + done.stderr).partition("Usage:")[0]  # its help is long
            raise PerfAnalyzerError(
                f"perf_analyzer on {model} ended with status {done.returncode}:\n{output}"
            )
        return read_turns(json.loads(record.read_text()))


def write_sessions(
    path: Path, picture: bytes, questions: Sequence[str], parameters: dict[str, Any]
) -> None:
    """Write perf_analyzer's input data: one session, asking `questions` one a turn.

    Its first turn has the picture, the later ones only text.
    """
    steps: list[dict[str, Any]] = [
        {
            "text_input": {"content": [question], "shape": [1]},
            "sampling_parameters": {"content": [json.dumps(parameters)], "shape": [1]},
        }
        for question in questions
    ]
    # As base64 text, which the server decodes: perf_analyzer repeats its inputs in its record
    # as they are, and raw bytes would make that invalid JSON.
    steps[0]["image"] = {"content": [base64.b64encode(picture).decode()], "shape": [1]}
    path.write_text(json.dumps({"data": [steps]}))


def read_turns(record: dict[str, Any]) -> list[Turn]:
    """The turns of perf_analyzer's exported record, in the order they were sent."""
    turns = []
    opened = set()
    for experiment in record["experiments"]:
        for request in sorted(experiment["requests"], key=lambda each: int(each["timestamp"])):
            turns.append(
                Turn(
                    opening=request["sequence_id"] not in opened,
                    sent=request["timestamp"] / 1e9,
                    responses=tuple(stamp / 1e9 for stamp in request["response_timestamps"]),
                )
            )
            opened.add(request["sequence_id"])
    return turns
