"""Memory of processes, read from /proc, and of a GPU."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
_PROC = Path("/proc")
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Process:
    """One running process."""

    pid: int
    name: str
    """`tritonserver`, the model's name for a stub of the Python backend, the module's name for
    `python -m`, else the program's."""

    @property
    def resident_mib(self) -> float:
        """Resident memory now, shared pages included."""
        return self._status("VmRSS")

    @property
    def peak_mib(self) -> float:
        """Resident memory at its highest since the process started."""
        return self._status("VmHWM")

    @property
    def private_mib(self) -> float:
        """Resident memory that is neither a file's nor shared."""
        return self._status("RssAnon")

    @property
    def busy_seconds(self) -> float:
        """Processor seconds that it and those of its children that have ended have used; 0 where it
        has ended itself, and its parent's hold them."""
        try:
            fields = (_PROC / str(self.pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        # utime, stime, cutime, cstime
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def _status(self, field: str) -> float:
        for line in (_PROC / str(self.pid) / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) / 1024
        raise ProcessLookupError(f"process {self.pid} has no {field}; has it ended?")


def busy_seconds() -> float:
    """Processor seconds that all processes of this machine have used since it started."""
    fields = (_PROC / "stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _waiting, interrupt, soft_interrupt, stolen = map(int, fields[:8])
    ticks = user + nice + system + interrupt + soft_interrupt + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


class OtherPrograms:
    """How many processors they keep busy, from now on: all programs but this process and those that
    it has started."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = self._now()

    def cores(self) -> float:
        """Until now."""
        ended, busy, own = self._now()
        used = (busy - self._busy) - (own - self._own)
        return max(0.0, used / (ended - self._began))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        family = with_descendants(os.getpid())
        return time.monotonic(), busy_seconds(), sum(each.busy_seconds for each in family)


def device_memory_mib() -> float | None:
    """Memory of the first GPU that is in use, by whomever; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return float(told.splitlines()[0])


def is_running(pid: int) -> bool:
    """Whether a process has not ended (one that nobody has waited for yet has)."""
    try:
        state = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def this_process() -> Process:
    """The running one."""
    return Process(os.getpid(), "this")


def with_descendants(pid: int) -> list[Process]:
    """A process, its children and theirs."""
    parents: dict[int, int] = {}
    for entry in _PROC.glob("[0-9]*"):
        try:
            # Behind the name, which may hold spaces and parentheses: state, parent.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(entry.name)] = int(fields[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return [Process(member, _name(member)) for member in family]


def shared_memory_mib(server: int) -> float:
    """Memory in /dev/shm of the Triton server with this process ID."""
    regions = set()
    for process in with_descendants(server):
        arguments = _arguments(process.pid)
        if arguments and arguments[0].endswith(_STUB):
            # llava_triton.server.server_guard: every server's regions begin with a name of its own.
            regions |= {part.rsplit("-", 1)[0] for part in arguments[1:] if _is_region(part)}
    files = [file for region in regions for file in Path("/dev/shm").glob(f"{region}-*")]
    return sum(file.stat().st_blocks * 512 for file in files) / MIB


def _is_region(argument: str) -> bool:
    return argument.startswith("llava-triton-server-")


def _arguments(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _name(pid: int) -> str:
    arguments = _arguments(pid)
    program = Path(arguments[0]).name if arguments else "?"
    if program == _STUB:
        return Path(arguments[1]).parents[1].name  # .../MODEL/1/model.py
    if program.startswith("python") and "-m" in arguments:
        return arguments[arguments.index("-m") + 1]
    return program
