"""A stage of `make gpu-check`: sessions opened on encoded pictures, encoder and engine alone."""

from __future__ import annotations

import statistics
import sys

from benchmarks.engine_load import Encoder
from benchmarks.gpu_check.stage import Findings, Options, Sizes, repository_folder, run_stage
from benchmarks.gpu_check.ways import Ask, EngineWay, Way, large_jpeg
from benchmarks.workload import Workload

PICTURES = 10_001
"""A load's number that nothing else has."""


class Openings:
    """Sessions opened on pictures that nobody has seen, until they are ready for questions.

    Args:
        way: who is asked.
        workload: makes pictures.
        sizes: how much is measured.
        findings: where it goes.
    """

    def __init__(self, way: Way, workload: Workload, sizes: Sizes, findings: Findings) -> None:
        self._way = way
        self._workload = workload
        self._sizes = sizes
        self._findings = findings

    def small(self) -> None:
        """A PNG as large as the encoder's input."""
        count = self._sizes.repeats + 2
        pictures = [self._workload.picture(PICTURES, number) for number in range(count)]
        self._measure("opening_small_ms", "336-px picture", pictures)

    def large(self) -> None:
        """A large JPEG."""
        size = self._sizes.large_picture
        pictures = [large_jpeg(size, number) for number in range(self._sizes.repeats + 2)]
        told = f"JPEG of {size[0]} x {size[1]} ({len(pictures[0]) / 1e6:.1f} MB)"
        self._measure("opening_large_ms", told, pictures)

    def _measure(self, name: str, what: str, pictures: list[bytes]) -> None:
        seconds = []
        for number, picture in enumerate(pictures):
            session = f"{name}-{number}"
            seconds.append(self._way.ask(Ask(session, picture=picture, start=True)).wait().seconds)
            self._way.ask(Ask(session, end=True)).wait()
        median = statistics.median(seconds[2:]) * 1000  # the first two warm up
        self._findings.add(name, median, f"opening on a {what}: {median:.1f} ms")


def measure(options: Options) -> None:
    """The stage."""
    repository = repository_folder(options.folder, options.geometry)
    way = EngineWay(
        options.checkpoint,
        options.place,
        Encoder(repository).features,
        record=False,  # nothing is decoded here
        max_sessions=options.place.sizes.many_sessions,
    )
    workload = Workload(str(options.checkpoint), str(repository))
    openings = Openings(way, workload, options.place.sizes, options.findings)
    options.findings.attempt("small", openings.small)
    options.findings.attempt("large", openings.large)
    way.close()


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
