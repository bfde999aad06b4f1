"""Folders in places where everybody may write."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_private(folder: Path) -> bool:
    """Whether this is a folder, no link to one, that belongs to us and that nobody else may write.

    Then nobody else can have put into it what we find there.
    """
    try:
        status = folder.lstat()
    except OSError:
        return False
    ours = status.st_uid == os.geteuid()
    return stat.S_ISDIR(status.st_mode) and ours and not status.st_mode & 0o022
