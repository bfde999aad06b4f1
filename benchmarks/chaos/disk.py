"""The disk that the journal lies on, which can fill up and go away."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_BYTES = 256 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Disk:
    """A small file system of its own, where this user may mount one; else an ordinary folder, which
    cannot be filled.

    Args:
        folder: where it is to be; made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        self.is_own = _succeeds(mount)
        """Whether it can be filled."""
        self.journal = folder / "journal"
        """The folder for the journal."""
        self.journal.mkdir()

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte more can be written meanwhile."""
        filler = self._folder / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                _fill(file.fileno())
            yield
        finally:
            filler.unlink(missing_ok=True)

    @contextmanager
    def away(self) -> Iterator[None]:
        """What is in the journal's place meanwhile is no folder."""
        other = self._folder / "no folder"
        other.touch()
        _exchange(self.journal, other)
        try:
            yield
        finally:
            _exchange(self.journal, other)
            other.unlink()

    def close(self) -> None:
        """Give it back. What is on it is lost, where it is a file system of its own."""
        if self.is_own:
            subprocess.run(["umount", "--lazy", str(self._folder)], check=True)


def _fill(file: int) -> None:
    for size in (1 << 20, 1 << 12, 1):
        try:
            while os.write(file, bytes(size)) == size:
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, at once: nobody sees a name without anything behind it."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (os.fsencode(one), os.fsencode(other))
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
