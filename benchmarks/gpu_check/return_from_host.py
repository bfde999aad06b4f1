"""A stage of `make gpu-check`: sessions whose keys and values left the device and came back."""

from __future__ import annotations

import statistics
import sys

from benchmarks.engine_way import EngineWay
from benchmarks.gpu_check.rows import limits_of
from benchmarks.gpu_check.stage import Options, run_stage
from benchmarks.limits import Limits
from benchmarks.load import Answer, Ask, exactly
from benchmarks.workload import Workload
from llava_triton.contract.settings import Settings
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.state import EngineState

HOST_BYTES = 4 << 30
SESSION = "memory"
OTHER = "other"
PICTURES = 10_002
"""A load's number that nothing else has."""


class ComingBack:
    """The same turn in a session that stayed, one that left for host memory, and one forgotten.

    Args:
        way: an engine with nothing open.
        options: of the stage.
        limits: of the device.
    """

    def __init__(self, way: EngineWay, options: Options, limits: Limits) -> None:
        self._way = way
        self._workload = Workload(str(options.checkpoint), "none")
        self._sizes = options.place.sizes
        self._findings = options.findings
        # Without a GPU both sides are the same memory: a copy reads and writes it.
        self._copy_rate = limits.host_copy_bytes_per_second or limits.copy_bytes_per_second / 2

    def measure(self) -> None:
        """All three, several times."""
        stayed, returned, computed, copies = [], [], [], []
        changed = rounded = 0
        for number in range(self._sizes.repeats + 1):
            first = self._turn(number, "stay")
            second = self._turn(number, "leave")
            third = self._turn(number, "forget")
            changed += first[0].text != second[0].text
            rounded += first[0].text != third[0].text
            if number:  # the first round warms up
                stayed.append(first[0].first_token_seconds)
                returned.append(second[0].first_token_seconds)
                computed.append(third[0].first_token_seconds)
                copies.append(second[1] / self._copy_rate)
        add = self._findings.add
        kept, back, again = (
            statistics.median(each) * 1000 for each in (stayed, returned, computed)
        )
        copy = statistics.median(copies) * 1000
        add("kept_ms", kept, f"first token in a session that stayed: {kept:.2f} ms")
        add("returned_ms", back, f"  in one that came back from host memory: {back:.2f} ms")
        add("computed_ms", again, f"  in one that was computed again: {again:.2f} ms")
        add("copy_ms", copy, f"  the copy's own time: {copy:.2f} ms")
        add("over_copy", (back - kept) / copy, f"coming back / copy: {(back - kept) / copy:.2f}")
        add("over_computing", back / again, f"coming back / computing: {back / again:.2f}")
        add("changed_answers", changed, f"{changed} answers changed by leaving and coming back")
        # Not a fault: a prompt's products round differently than those of single tokens did.
        add("changed_by_computing", rounded, f"{rounded} changed by being computed again")
        counts = self._way.engine.statistics()
        expected = self._sizes.repeats + 1
        if (counts.restored_from_host, counts.restored_by_computing) != (expected, expected):
            self._findings.fault(
                f"{counts.restored_from_host} sessions came back from host memory and "
                f"{counts.restored_by_computing} by computing, but {expected} of each should have"
            )
        if changed:
            self._findings.fault(f"{changed} answers changed")

    def _turn(self, number: int, fate: str) -> tuple[Answer, int]:
        """A turn in a session that has met its fate, and the bytes of what it remembered."""
        sizes, way = self._sizes, self._way
        picture = self._workload.picture(PICTURES, number)
        tokens = max(4, sizes.context_tokens - way.features_shape[0])
        text = self._workload.text(tokens, f"m{number}")
        way.ask(Ask(SESSION, True, False, text, [picture], exactly(1))).wait()
        size = way.engine.inspect(lambda state: _leave(state, fate)).result()
        # What was planned is done before a step: before this one, not before the one measured.
        way.ask(Ask(OTHER, True, True, f"Hello {number}", sampling=exactly(1))).wait()
        question = self._workload.text(sizes.question_tokens, f"q{number}")
        answer = way.ask(Ask(SESSION, text=question, sampling=exactly(16))).wait()
        way.ask(Ask(SESSION, end=True)).wait()
        way.engine.inspect(lambda state: _forget_free_blocks(state.memory)).result()
        return answer, size * way.runner.block_bytes


def _leave(state: EngineState, fate: str) -> int:
    """As memory pressure would do it. Returns the session's blocks."""
    session, memory = state.sessions.get(SESSION), state.memory
    blocks = len(session.key_values.blocks)
    if fate == "leave":
        memory.evict(session)
    elif fate == "forget":  # as `evict` does where host memory is too small
        memory.truncate(session, 0)
        session.key_values.dropped = True
    _forget_free_blocks(memory)
    return blocks


def _forget_free_blocks(memory: SessionMemory) -> None:
    """Nobody finds what they held, as if they had been given out meanwhile."""
    pool = memory.pool
    for block in pool.allocate(pool.free) or []:
        pool.release(block)


def measure(options: Options) -> None:
    """The stage."""
    limits = limits_of(options)
    place = options.place
    settings = Settings(dtype=place.dtype_name, max_sessions=2, host_cache_bytes=HOST_BYTES)
    way = EngineWay(options.checkpoint, settings, device=place.device)
    options.findings.attempt("coming back", ComingBack(way, options, limits).measure)
    way.close()


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
