"""Knows within a moment that a filled repository needs nothing done.

It compares what the repository was made from (sizes and times of the checkpoint's files, the code,
the settings) and what was made. Only a difference makes the export look closer, at contents.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE_NAME = "export.json"
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def fingerprint(files: list[Path], sources: list[Path], options: dict[str, Any]) -> dict[str, Any]:
    """Everything a repository is made from.

    Args:
        files: the checkpoint's; compared by size and time.
        sources: code and templates; compared by content.
        options: of this export; must survive JSON unchanged.
    """
    return {
        "checkpoint": {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "sources": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "packages": {name: _version(name) for name in _PACKAGES},
        "options": options,
    }


def write(repository: Path, made_from: dict[str, Any]) -> None:
    """Note in a filled repository what it was made from and what it consists of."""
    manifest = {"made_from": made_from, "made": _listing(repository)}
    (repository / FILE_NAME).write_text(json.dumps(manifest, indent=1) + "\n")


def is_current(repository: Path, made_from: dict[str, Any]) -> bool:
    """Whether `repository` is whole and was made from exactly this."""
    try:
        manifest = json.loads((repository / FILE_NAME).read_text())
    except (OSError, ValueError):
        return False
    wanted = {"made_from": made_from, "made": _listing(repository)}
    return bool(manifest == wanted)


def _listing(repository: Path) -> dict[str, Any]:
    """Files of a repository with their sizes, and links with their targets."""
    listing: dict[str, Any] = {}
    for folder, folders, names in os.walk(repository):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in [*names, *folders]:
            path = Path(folder, name)
            if path.is_symlink():
                listing[str(path.relative_to(repository))] = os.readlink(path)
            elif name in names and name != FILE_NAME:
                listing[str(path.relative_to(repository))] = path.stat().st_size
    return listing


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
