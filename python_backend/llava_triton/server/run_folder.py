"""The folder of a running server, in a place where everybody may write."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path

from llava_triton.private_folder import is_private
from llava_triton.server import server_guard
from llava_triton.server.server_error import ServerError


def make_run_folder() -> Path:
    """A new folder, ours alone, whose name is the server's; dead servers' folders are removed."""
    parent = _unquoted_temporary_folder()
    remove_stale(parent)
    return Path(tempfile.mkdtemp(prefix=server_guard.PREFIX, dir=parent))


def remove_stale(parent: Path) -> None:
    """Remove the traces of servers whose guard was killed: their lock files are free again.

    Others may make folders and links of such names too. What is not a folder that only we can
    write, with a lock file in it that is ours, is none of our servers'.
    """
    for folder in parent.glob(f"{server_guard.PREFIX}*"):
        if server_guard.NAME.fullmatch(folder.name) and is_private(folder) and _is_free(folder):
            server_guard.remove_traces(folder)


def _is_free(folder: Path) -> bool:
    """Whether the folder has a lock file that no living guard holds."""
    descriptor = -1
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(folder / server_guard.LOCK, flags)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a living guard, or gone meanwhile
        return False
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return True


def _unquoted_temporary_folder() -> Path:
    """A folder for temporary files whose path a shell takes for one word."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if re.fullmatch(r"[\w./+-]+", candidate, re.ASCII) and os.access(candidate, os.W_OK):
            return Path(candidate)
    raise ServerError(
        f"Triton needs a folder for temporary files without spaces in its path, and neither "
        f"{tempfile.gettempdir()} nor /tmp will do; set TMPDIR to one"
    )
