"""What of this machine each engine gets: a GPU or a part of the cores, and a part of the memory."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_triton.contract.engines import ENGINES, engines_here
from llava_triton.server.server_error import ServerError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """One engine's part of the machine; by default all of it."""

    environment: dict[str, str] = field(default_factory=dict)
    """What its processes are told."""
    cores: frozenset[int] | None = None
    """Those that its processes run on; None: all."""

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Processes that this thread starts within run on the share's cores."""
        if self.cores is None:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def shares(engines: int | None = None) -> list[Share]:
    """The machine, shared out.

    On a GPU machine an engine has a GPU for itself. The cores are everybody's there: they mostly
    wait for GPUs. Where the CPU is the device an engine has cores for itself, because threads that
    compute together wait for each other.

    Args:
        engines: how many; None: what LLAVA_ENGINES says, else one a GPU, and one without GPUs.

    Raises:
        ServerError: a number that this machine cannot have.
    """
    gpus = visible_gpus()
    count = engines if engines is not None else _told() or max(1, len(gpus))
    if count < 1 or (gpus and count > len(gpus)):
        most = f"at most {len(gpus)}, one a GPU" if gpus else "1 at least"
        raise ServerError(f"{count} engines were asked for (--engines, {ENGINES}); {most}")
    several = {ENGINES: str(count)} if count > 1 else {}
    if gpus:
        used = gpus[:count] if len(gpus) > 1 else [None]
        return [Share(several | ({_VISIBLE: gpu} if gpu else {})) for gpu in used]
    if count == 1:
        return [Share()]
    return [Share(several, cores) for cores in _split(sorted(os.sched_getaffinity(0)), count)]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process may use; none: it has no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    # An order of the operator's own, or names, stay; CUDA ends at the first that it does not know.
    named = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count.value)])[: count.value]


def _told() -> int | None:
    try:
        return engines_here()
    except ValueError as error:
        raise ServerError(str(error)) from None


def _split(cores: list[int], parts: int) -> list[frozenset[int]]:
    """Neighbours together; where there are fewer cores than parts, parts share them."""
    if len(cores) < parts:
        return [frozenset({cores[part % len(cores)]}) for part in range(parts)]
    bounds = [len(cores) * part // parts for part in range(parts + 1)]
    return [frozenset(cores[begin:end]) for begin, end in itertools.pairwise(bounds)]
