"""What happens to the endpoint, every few seconds."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import AbstractContextManager, suppress

from benchmarks.chaos.disk import Disk
from benchmarks.chaos.endpoint import Endpoint, parts
from benchmarks.processes import Process, is_running, with_descendants

FAULTS = {
    "kill -9 of a model's process": 4,
    "kill -9 of a Triton": 3,
    "kill -9 of an adapter": 3,
    "kill -9 of an instance's entry point": 1,
    "SIGSTOP of a model's process": 2,
    "SIGSTOP of an adapter": 2,
    "SIGSTOP of a whole instance": 1,
    "SIGTERM of an instance": 1,
    "a full disk": 1,
    "a disk that goes away": 1,
}
"""Relative frequencies."""
STOPPED_SECONDS = (0.3, 3.0)
GROWN = "SIGSTOP of a whole instance"


class Faults(threading.Thread):
    """Harms an endpoint until it is told to end.

    Args:
        endpoint: started.
        disk: that the journal lies on.
        between: seconds between two faults, at least and at most.
        seed: of what comes when.
    """

    def __init__(
        self, endpoint: Endpoint, disk: Disk, between: tuple[float, float], seed: int
    ) -> None:
        super().__init__(name="faults", daemon=True)
        self.counts: Counter[str] = Counter()
        self._endpoint = endpoint
        self._disk = disk
        self._between = between
        self._rng = random.Random(seed)
        # Each kind once, before chance decides.
        self._next = self._rng.sample([*FAULTS], len(FAULTS))
        self._told = threading.Event()

    def end(self) -> None:
        """No more faults; returns when what was stopped goes on."""
        self._told.set()
        self.join()

    def run(self) -> None:
        """See `threading.Thread`."""
        while not self._told.wait(self._rng.uniform(*self._between)):
            fault = self._rng.choices([*FAULTS], [*FAULTS.values()])[0]
            fault = self._next.pop() if self._next else fault
            if fault in ("a full disk", "a disk that goes away"):
                self.counts[fault] += self._harm_disk(fault)
                continue
            instances = list(self._endpoint.instances())
            if instances and self._do(fault, self._rng.choice(instances)):
                self.counts[fault] += 1

    def _harm_disk(self, fault: str) -> bool:
        is_full = fault == "a full disk"
        if is_full and not self._disk.is_own:
            return False
        print(f"{time.strftime('%H:%M:%S')} {fault}", flush=True)
        harm: AbstractContextManager[None] = self._disk.full() if is_full else self._disk.away()
        with harm:
            self._told.wait(self._rng.uniform(*STOPPED_SECONDS))
        return True

    def _do(self, fault: str, instance: list[Process]) -> bool:
        how, _, what = fault.partition(" of ")
        found = parts(instance)
        victims = found.get({"a model's process": "model", "a Triton": "triton"}.get(what, ""), [])
        if "adapter" in what:
            victims = found.get("adapter", [])
        elif "instance" in what:
            victims = found["instance"]
        if not victims:
            return False  # it is starting
        victim = self._rng.choice(victims)
        if how == "SIGSTOP":
            whole = fault == GROWN
            stopped = with_descendants(victim.pid) if whole else [victim]
            self._stop_for([each.pid for each in stopped], self._rng.uniform(*STOPPED_SECONDS))
        else:
            _send(victim.pid, signal.SIGKILL if how == "kill -9" else signal.SIGTERM)
        print(f"{time.strftime('%H:%M:%S')} {fault}: {victim.name} ({victim.pid})", flush=True)
        return True

    def _stop_for(self, processes: list[int], seconds: float) -> None:
        try:
            for process in processes:
                _send(process, signal.SIGSTOP)
            self._told.wait(seconds)
        finally:
            for process in processes:
                if is_running(process):
                    _send(process, signal.SIGCONT)


def _send(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)
