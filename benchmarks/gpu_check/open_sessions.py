"""A stage of `make gpu-check`: how many sessions with their image features fit on the device."""

from __future__ import annotations

import math
import sys
import time

import torch

from benchmarks.engine_way import EngineWay
from benchmarks.gpu_check.stage import Options, run_stage
from benchmarks.load import Ask, exactly
from llava_triton.contract.settings import Settings

OPENING_SECONDS = 75.0
"""For opening as many sessions as are wanted."""
AT_ONCE = 4
"""Openings in flight, so that the device does not wait for the next picture."""
SPARE_SESSIONS = 16


class OpenSessions:
    """Sessions that stay open, each with a picture of its own.

    Args:
        way: an engine with room for all of them, which has opened none.
        options: of the stage.
    """

    def __init__(self, way: EngineWay, options: Options) -> None:
        place = options.place
        self._way = way
        self._device = place.device
        self._sizes = place.sizes
        self._picture_bytes = math.prod(way.features_shape) * place.dtype.itemsize
        self._findings = options.findings
        self._open = 0

    def fit(self) -> None:
        """How many fit, from the memory that the first ones took."""
        before = self._used_bytes()
        self._open_until(self._sizes.opened_sessions, time.perf_counter() + OPENING_SECONDS)
        picture = self._picture_bytes
        # Some may have found room in what was reserved before.
        each = max(picture, (self._used_bytes() - before) / self._open)
        told = f"{self._open} sessions opened: {each / 1e6:.2f} MB of the device for each one's "
        self._findings.add("bytes_a_session", each, f"{told}picture")
        fit = self._way.runner.image_bytes_on_device // picture
        if self._device.type == "cuda":  # what the allocator loses between pictures counts, too
            free = torch.cuda.mem_get_info()[0]
            fit = min(fit, self._open + int(free / each))
        self._findings.add("sessions_that_fit", fit, f"  so {fit:,} fit (computed)")

    def really(self) -> None:
        """Open as many as are wanted, or as there is time for; the oldest one still answers."""
        self._open_until(self._sizes.wanted_sessions, time.perf_counter() + OPENING_SECONDS)
        now = self._way.engine.statistics()
        told = f"{now.sessions_open:,} sessions are open with {now.images:,} pictures, "
        told += f"{now.images_evicted} of them in host memory"
        self._findings.add("sessions_opened", now.sessions_open, told)
        if now.images_evicted:
            self._findings.fault(f"{now.images_evicted} pictures had to leave the device")
        answer = self._way.ask(Ask("open-0", text="What is it?", sampling=exactly(4))).wait()
        milliseconds = answer.first_token_seconds * 1000
        told = f"the one that was opened first answers after {milliseconds:.1f} ms"
        self._findings.add("oldest_first_token_ms", milliseconds, told)

    def _open_until(self, wanted: int, ends_at: float) -> None:
        coming = []
        while self._open < wanted and time.perf_counter() < ends_at:
            number = self._open
            picture = number.to_bytes(8, "little")  # features are made of it
            coming.append(self._way.ask(Ask(f"open-{number}", start=True, images=[picture])))
            self._open += 1
            if len(coming) == AT_ONCE:
                coming.pop(0).wait()
        for answer in coming:
            answer.wait()

    def _used_bytes(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()
        return self._way.engine.inspect(lambda state: state.images.device_bytes).result()


def measure(options: Options) -> None:
    """The stage."""
    place = options.place
    settings = Settings(
        dtype=place.dtype_name,
        max_sessions=place.sizes.wanted_sessions + SPARE_SESSIONS,
        host_cache_bytes=1,  # on the device or not at all
    )
    # Little is decoded here.
    way = EngineWay(options.checkpoint, settings, device=place.device, record=False)
    opened = OpenSessions(way, options)
    options.findings.attempt("fit", opened.fit)
    options.findings.attempt("really", opened.really)
    way.close()


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
