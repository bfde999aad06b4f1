"""The threads that bring steps to the device and their results back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llava_triton.model.runner import ModelRunner
from llava_triton.model.step import Step, StepResult

Done = Callable[[Future[StepResult]], None]
"""Gets what comes of a step."""


class DeviceThreads:
    """Steps go to the device one after another, and come back in that order.

    One thread launches them. Where a step may be launched before the one before is done, another
    one waits for results.

    Args:
        runner: the device.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._launching = ThreadPoolExecutor(1, "device", initializer=runner.use_threads)
        self._waiting = ThreadPoolExecutor(1, "results") if runner.steps_at_once > 1 else None

    def compute(self, step: Step, done: Done) -> None:
        """Launch a step behind those that were given before; `done` gets what comes of it, on one
        of these threads."""
        if self._waiting is None:
            computed = self._launching.submit(lambda: self._runner.launch(step).wait())
        else:
            launched = self._launching.submit(lambda: self._runner.launch(step))
            computed = self._waiting.submit(lambda: launched.result().wait())
        computed.add_done_callback(done)

    def shutdown(self) -> None:
        """Return when all steps are done and the threads have ended."""
        self._launching.shutdown()
        if self._waiting is not None:
            self._waiting.shutdown()
