"""The process between us and tritonserver: whatever happens, nothing of the server stays behind.

tritonserver starts one stub process per Python model. When it is killed they live on, and so do
their shared-memory files; and a parent that is itself killed cannot clean up. So a small guard
stands between: parent -> guard -> tritonserver -> stubs. It ends the server when it is told to or
when the parent is gone, and when the server is gone it ends the stubs and removes the files.

Run as a script by `llava_triton.server`, with the standard library alone, so that it starts in
milliseconds. Linux only, like Triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "llava-triton-server-"
"""Run folders and shared-memory files begin with `llava-triton-server-<random>`: one name a
server."""
GRACE_SECONDS = 2.0
"""How long tritonserver may take over its own shutdown before it is killed."""
_SHARED_MEMORY = Path("/dev/shm")
_LOCK = "guard.lock"
_STUB = b"triton_python_backend_stub"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def remove_traces(run_folder: Path) -> None:
    """Remove a dead server's leftovers: stub processes, shared memory, run folder.

    Only what carries the run folder's unique name is touched, so that other Triton servers on
    the machine, ours or not, are safe.
    """
    name = run_folder.name
    if not name.startswith(PREFIX) or name == PREFIX:
        raise ValueError(f"{run_folder} is not a run folder of a server")
    for process in stubs(name):
        _kill(process, signal.SIGKILL)
    for path in _SHARED_MEMORY.glob(f"{glob.escape(name)}*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(run_folder, ignore_errors=True)


def remove_stale(parent_folder: Path) -> None:
    """Remove the traces of servers whose guard was killed: their lock files are free again."""
    for lock_path in parent_folder.glob(f"{PREFIX}*/{_LOCK}"):
        try:
            if lock_path.stat().st_uid != os.getuid():
                continue
            with lock_path.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by a living guard, or gone meanwhile
            continue
        remove_traces(lock_path.parent)


def stubs(name: str) -> list[int]:
    """Stub processes of the server called `name`: their second argument is a region of its."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_stub = arguments[0].endswith(_STUB)
        if is_stub and any(argument.startswith(name.encode()) for argument in arguments):
            found.append(int(entry.name))
    return found


def _kill(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _hold_lock(run_folder: Path) -> None:
    """Lock the run folder for this process's life. The lock appears under its name only once it
    is held, so that `remove_stale` in another process never sees it free by mistake."""
    descriptor = os.open(run_folder / "new.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(run_folder / "new.lock", run_folder / _LOCK)


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
