"""The session engine: open sessions, their memory on the device, and the loop that answers turns.

It knows nothing of Triton. `Engine.submit` takes a turn and calls back with pieces of its answer.

A turn that fails or is cancelled is rolled back in `engine.py`. `scheduler.py` says whose blocks
are evicted, `session_memory.py` evicts them, and `block_pool.py` gives out cached ones again.
`journaling.py` brings sessions back.
"""

from llava_triton.engine.engine import Engine
from llava_triton.engine.statistics import Statistics
from llava_triton.engine.turn import TurnRequest

__all__ = ["Engine", "Statistics", "TurnRequest"]
