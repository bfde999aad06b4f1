"""What an engine holds, for whoever looks into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llava_triton.engine.image_store import ImageStore
from llava_triton.engine.lanes import Lanes
from llava_triton.engine.scheduler import Scheduler
from llava_triton.engine.session import Session
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.session_table import SessionTable
from llava_triton.engine.turn import RunningTurn


@dataclass(frozen=True)
class EngineState:
    """An engine's own objects. They are to be used on its thread only, see `Engine.inspect`."""

    sessions: SessionTable
    lanes: Lanes
    memory: SessionMemory
    images: ImageStore
    scheduler: Scheduler
    running: Sequence[RunningTurn]
    """In the order they began."""
    idle_sessions: Callable[[], Iterator[Session]]
    """Sessions that have blocks and no turn, longest unused first."""
    steps_in_flight: int
    """Steps that the device has."""
    steps_lost: int
    """Of those, how many are of no use: they built on a step that failed."""
    to_try_alone: int
    """Turns of a step that failed, which are tried again one by one."""
