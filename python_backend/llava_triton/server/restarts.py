"""Serving on after a fault: the one loop that starts, watches and starts again."""

from __future__ import annotations

import time
from collections.abc import Callable

from llava_triton.server.server_error import ServerError, StartCrashError

POLL_SECONDS = 0.2
"""Time between two looks at what serves: clients are to hear of its death within a second."""
RESTARTS = 3
"""So often may what serves be started again ..."""
RESTARTS_SECONDS = 600.0
"""... in this time. What dies more often dies of something that a new start does not mend."""


class DiesAgainError(ServerError):
    """What serves has died too often to be started once more."""


class Faults:
    """Counts what went wrong lately."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def one_more(self) -> int:
        """Count one; how many there were in the last ten minutes."""
        now = time.monotonic()
        self._times = [each for each in self._times if now - each < RESTARTS_SECONDS] + [now]
        return len(self._times)


def keep_serving(
    start: Callable[[], None],
    fault: Callable[[], str | None],
    stop_at_once: Callable[[], None],
    say: Callable[[str], None],
    *,
    told: Callable[[], bool] = lambda: False,
    restarts: int = RESTARTS,
    lost: str = "its sessions are lost",
) -> None:
    """Start, watch, and start again after every fault; return when told to end.

    Args:
        start: starts what serves, and returns when it does. A start that fails is a fault like any
            other, except for the first one, which ends everything unless it was a crash.
        fault: asked every 0.2 s: what has broken what serves, None while it is well. What it
            raises ends everything.
        stop_at_once: ends what is left of it. Connections must break: only by that do clients hear
            that the rest of their answer does not come.
        say: tells the operator.
        told: whether to end; what serves goes on then, for the caller to end.
        restarts: at most so many in ten minutes.
        lost: what becomes of the sessions, for the operator.

    Raises:
        ServerError: the first start has failed.
        DiesAgainError: one fault more than that.
    """
    faults = Faults()
    found: str | None
    has_served = False
    while True:
        try:
            start()
        except ServerError as error:
            if told():
                return
            if not has_served and not isinstance(error, StartCrashError):
                raise
            found = str(error)
        else:
            has_served, found = True, None
        while found is None:
            if told():
                return
            time.sleep(POLL_SECONDS)
            found = fault()
        stop_at_once()
        times = faults.one_more()
        if times > restarts:
            often = f"; parts of Triton died {times} times in "
            often += f"{RESTARTS_SECONDS / 60:.0f} minutes"
            raise DiesAgainError(f"{found}{often if restarts else ''}; its log has the last words")
        say(f"{found}: starting Triton again; {lost}")
