"""A stage of `make gpu-check`: the same figures through a real Triton server over gRPC."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu_check.openings import Openings
from benchmarks.gpu_check.rows import Rows, limits_of
from benchmarks.gpu_check.stage import (
    Findings,
    Options,
    read_findings,
    repository_folder,
    run_stage,
)
from benchmarks.load import TransportWay
from llava_triton.client.grpc import GrpcTransport
from llava_triton.server.triton_server import TritonServer, free_ports

WORTH_TELLING = ("unrecorded", "falling back", "CUDA", "cuda", "IPC")
TAIL_LINES = 80


@contextmanager
def _log_shown(log: Path, findings: Findings) -> Iterator[None]:
    """Show of the server's log what may explain the figures, and its end where something broke."""
    broke = True
    try:
        yield
        broke = bool(findings.faults)
    finally:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        told = [line for line in lines if any(word in line for word in WORTH_TELLING)]
        for line in lines[-TAIL_LINES:] if broke else told[:TAIL_LINES]:
            print(f"  log: {line}", flush=True)


def measure(options: Options) -> None:
    """The stage."""
    findings = options.findings
    repository = repository_folder(options.folder, options.geometry)
    limits = limits_of(options)
    log = options.folder / "triton.log"
    began = time.perf_counter()
    with _log_shown(log, findings), TritonServer(repository, *free_ports(3), log=log) as server:
        seconds = time.perf_counter() - began
        findings.add("start_seconds", seconds, f"the server is ready after {seconds:.1f} s")
        way = TransportWay(lambda: GrpcTransport(server.grpc_address))
        rows = Rows(way, options, limits)
        openings = Openings(way, options)
        rows.measure(
            openings.at_once,
            rows.warm_up,
            rows.decode_one,
            rows.later_turn,
            openings.small,
            openings.large,
            rows.decode_many,
        )
        way.close()
    engine = read_findings(options.folder / "findings-rows.json")["values"]
    name = "decode_many_tokens_per_second"
    if name in engine and name in findings.values:
        share = findings.values[name] / engine[name]
        findings.add("many_of_engine", share, f"{100 * share:.1f} % of the engine's tokens/s")
    else:
        findings.leave_out("many_of_engine", "one of the two figures is missing")
    told = [
        line for line in log.read_text(errors="replace").splitlines() if "encoder is run" in line
    ]
    findings.add("vision_encoder", told[-1:], told[-1] if told else "the log names no encoder")


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
