"""Work that takes the longer the larger a request is, off the event loop's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

LARGE_BYTES = 64 * 1024
"""What is no larger costs less than the way to another thread and back: it stays on the loop."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_WORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-requests")
"""One: what many clients send at once takes turns, and never more than one core."""


async def off_loop(
    size: int,
    function: Callable[Parameters, Result],
    *arguments: Parameters.args,
    **keywords: Parameters.kwargs,
) -> Result:
    """What a function returns; called in the worker's thread where there is much to do.

    The interpreter's lock goes from thread to thread only between calls into C. So what runs here
    must not spend long in a single one that holds the lock: large data is handled in pieces.

    Args:
        size: bytes that the function goes through.
    """
    if size <= LARGE_BYTES:
        return function(*arguments, **keywords)
    call = partial(function, *arguments, **keywords)
    return await asyncio.get_running_loop().run_in_executor(_WORKER, call)
