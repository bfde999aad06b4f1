"""A stage of `make gpu-check`: sessions opened on encoded pictures, encoder and engine alone."""

from __future__ import annotations

import statistics
import sys

from benchmarks.engine_way import Encoder, EngineWay
from benchmarks.gpu_check.stage import Options, repository_folder, run_stage
from benchmarks.load import Ask, Way
from benchmarks.pictures import large_jpeg
from benchmarks.workload import Workload
from llava_triton.contract.settings import Settings

PICTURES = 10_001
"""A load's number that nothing else has."""


FIRST_AT_ONCE = 8


class Openings:
    """Sessions opened on pictures that nobody has seen, until they are ready for questions.

    Args:
        way: who is asked.
        options: of the stage.
    """

    def __init__(self, way: Way, options: Options) -> None:
        self._way = way
        self._workload = Workload(str(options.checkpoint), "none")
        self._sizes = options.place.sizes
        self._findings = options.findings

    def at_once(self) -> None:
        """The server's very first pictures, all at once: where one never comes back, this is cut
        off. (NVIDIA's Python backend has a deadlock there before release 26.07.)"""
        waiting = []
        for number in range(FIRST_AT_ONCE):
            picture = self._workload.picture(PICTURES + 1, number)
            session = f"first-{number}"
            waiting.append(self._way.ask(Ask(session, start=True, end=True, images=[picture])))
        seconds = [answer.wait().seconds for answer in waiting]
        told = f"the first {FIRST_AT_ONCE} pictures at once: {max(seconds) * 1000:.0f} ms for all"
        self._findings.add("first_at_once_ms", max(seconds) * 1000, told)

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
            opening = Ask(session, start=True, images=[picture])
            seconds.append(self._way.ask(opening).wait().seconds)
            self._way.ask(Ask(session, end=True)).wait()
        median = statistics.median(seconds[2:]) * 1000  # the first two warm up
        self._findings.add(name, median, f"opening on a {what}: {median:.1f} ms")


def measure(options: Options) -> None:
    """The stage."""
    place = options.place
    repository = repository_folder(options.folder, options.geometry)
    way = EngineWay(
        options.checkpoint,
        Settings(dtype=place.dtype_name, max_sessions=place.sizes.many_sessions),
        Encoder(repository).features,
        device=place.device,
        record=False,  # nothing is decoded here
    )
    openings = Openings(way, options)
    options.findings.attempt("small", openings.small)
    options.findings.attempt("large", openings.large)
    way.close()


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
