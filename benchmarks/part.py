"""One way of answering under the loads of the benchmark, in a process of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.engine_way import EngineWay
from benchmarks.fairness import measure_fairness
from benchmarks.load import TransportWay, Way, hold_all, write_loads
from benchmarks.references import Transformers, TransformersWay
from benchmarks.workload import Workload
from llava_triton.client.grpc import GrpcTransport
from llava_triton.device import default_device
from llava_triton.server.triton_server import TritonServer, free_ports


@contextmanager
def way_of(options: argparse.Namespace, workload: Workload) -> Iterator[tuple[Way, int | None]]:
    """What answers, and the process ID of its server, if it has one."""
    if options.kind == "triton":
        log: Path = options.output.with_suffix(".log")
        with TritonServer(workload.repository, *free_ports(3), log=log) as server:
            way: Way = TransportWay(lambda: GrpcTransport(server.grpc_address))
            yield way, server.pid
            way.close()
        return
    if options.kind == "engine":
        way = EngineWay.of_repository(
            Path(workload.repository), workload.dtype, weights=options.weights
        )
    else:
        dtype = getattr(torch, workload.dtype)
        reference = Transformers(Path(workload.checkpoint), default_device(), dtype)
        way = TransformersWay(reference, kept=options.kept)
    yield way, None
    way.close()


def main() -> int:
    """Measure the loads, and then the fairness if it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("engine", "triton", "transformers"))
    parser.add_argument("--workload", type=Path, required=True, help="what `Workload.write` wrote")
    parser.add_argument("--sessions", type=int, nargs="+", required=True, help="ascending")
    parser.add_argument("--output", type=Path, required=True, help="where to write the loads")
    parser.add_argument("--weights", default="unrounded", help="the engine's `Settings.weights`")
    parser.add_argument("--kept", action="store_true", help="transformers keeps its cache")
    parser.add_argument("--fairness", type=Path, help="measure the engine's, and write it there")
    options = parser.parse_args()
    workload = Workload.read(options.workload)
    with way_of(options, workload) as (way, server):
        write_loads(options.output, hold_all(way, workload, options.sessions, server))
        if options.fairness is not None:
            measured = asdict(measure_fairness(way, workload))
            options.fairness.write_text(json.dumps(measured, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
