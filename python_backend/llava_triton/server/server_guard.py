"""The process between us and tritonserver: whatever happens, nothing of the server stays behind.

tritonserver starts one stub process per Python model. When it is killed they live on, and so do
their shared-memory files; and a parent that is itself killed cannot clean up. So a small guard
stands between: parent -> guard -> tritonserver -> stubs. It ends the server when it is told to or
when the parent is gone, and when the server is gone it ends the stubs and removes the files.

Run as a script by `triton_server.py`, with the standard library alone, so that it starts in
milliseconds. Linux only, like Triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "llava-triton-server-"
NAME = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}")
"""A server's name, whole: what `tempfile.mkdtemp` makes of the prefix. Its run folder is called so,
and its shared-memory files begin with it and a hyphen. No name is the beginning of another."""
LOCK = "guard.lock"
"""In a run folder: locked for as long as its guard lives."""
GRACE_SECONDS = 2.0
"""How long tritonserver may take over its own shutdown before it is killed."""
KILL = b"k"
"""What the parent writes to have no grace; to be told to end at all, it closes the pipe."""
_SHARED_MEMORY = Path("/dev/shm")
_STUB = "triton_python_backend_stub"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def remove_traces(run_folder: Path) -> None:
    """Remove a dead server's leftovers: stub processes, shared memory, run folder.

    Only what carries the run folder's unique name is touched, so that other Triton servers on
    the machine, ours or not, are safe.
    """
    name = run_folder.name
    if not NAME.fullmatch(name):
        raise ValueError(f"{run_folder} is not a run folder of a server")
    for process in stubs(name):
        _kill(process, signal.SIGKILL)
    for region in shared_memory(name):
        with contextlib.suppress(OSError):
            region.unlink()
    shutil.rmtree(run_folder, ignore_errors=True)  # follows no link


def shared_memory(name: str) -> list[Path]:
    """Shared-memory files of the server called `name`: files of ours. Everybody may make
    something in that folder, under any name."""
    found = []
    for path in _SHARED_MEMORY.glob(f"{name}-*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                found.append(path)
    return found


def stubs(name: str) -> dict[int, str]:
    """Processes of the Python models of the server called `name`, and the model of each."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = entry.stat().st_uid == os.geteuid()
            program, *arguments = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        # .../MODEL/VERSION/model.py, then the region.
        is_stub = program.endswith(_STUB) and len(arguments) > 1
        if ours and is_stub and arguments[1].startswith(f"{name}-"):
            found[int(entry.name)] = Path(arguments[0]).parents[1].name
    return found


def _kill(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _hold_lock(run_folder: Path) -> None:
    """Lock the run folder for this process's life. The lock appears under its name only once it
    is held, so that `remove_stale` in another process never sees it free by mistake."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
    descriptor = os.open(run_folder / "new.lock", flags, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(run_folder / "new.lock", run_folder / LOCK)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start tritonserver as the leader of its own process group, which its stubs share; the
    kernel kills it if this guard is killed."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
        # Safe here, where there is but one thread.
        preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )


def _has_exited(process: int) -> bool:
    """Whether a child has exited, leaving it unreaped, so that its number stays its own."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait_for_end(server: int, parent: int) -> None:
    """Return when the server has exited, having asked it to if the parent wants so or is gone."""
    told = False
    killed_at = float("inf")
    while not _has_exited(server):
        if not told:
            # The parent closes our standard input to stop us; a killed parent closes it too,
            # unless a fork of it still holds the other end.
            readable, _, _ = select.select([sys.stdin], [], [], 0.1)
            if readable or os.getppid() != parent:
                told = True
                if readable and os.read(sys.stdin.fileno(), 1) == KILL:
                    _kill(server, signal.SIGKILL)
                    continue
                killed_at = time.monotonic() + GRACE_SECONDS
                _kill(server, signal.SIGTERM)
        elif time.monotonic() > killed_at:
            _kill(server, signal.SIGKILL)
            killed_at = float("inf")
        else:
            time.sleep(0.02)


def _end_group(server: int) -> None:
    """Kill what is left of the server's group, and reap it: orphans are our children now."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(server, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            process, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            time.sleep(0.01)


def main(arguments: list[str]) -> int:
    """`server_guard.py PARENT_PID RUN_FOLDER COMMAND...`; prints the server's process ID.

    Returns the server's exit status, 128 + the signal's number if one killed it.
    """
    parent, run_folder, command = int(arguments[0]), Path(arguments[1]), arguments[2:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The parent decides. (Handlers, unlike SIG_IGN, are not inherited by tritonserver.)
        signal.signal(number, lambda *_: None)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _hold_lock(run_folder)
    try:
        server = _start(command)
        print(server.pid, flush=True)
        _wait_for_end(server.pid, parent)
        result = os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert result is not None
        _end_group(server.pid)
        return result.si_status + (0 if result.si_code == os.CLD_EXITED else 128)
    finally:
        remove_traces(run_folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
