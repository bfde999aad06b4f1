"""Where a checkpoint comes from: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llava_export.errors import ExportError
from llava_triton.checkpoint.weights import CONFIG

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a checkpoint is loaded from; published ones hold the weights in other formats too."""
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A checkpoint, and where it is from."""

    directory: Path
    name: str | None = None
    """On the hub; None for a directory."""
    commit: str | None = None
    """Of the hub's repository: what a branch or a tag stood for when it was downloaded."""


def find_checkpoint(model: str) -> Source:
    """Where a checkpoint lies; downloads it if `model` is a hub name not seen before.

    Args:
        model: a directory, a hub name or `name@revision`: a branch, a tag or a commit. Without
            one it is whatever the hub's main branch is now.

    Raises:
        ExportError: there is no such directory or hub name, or it holds no checkpoint.
    """
    source = Source(Path(model).resolve()) if Path(model).exists() else _download(model)
    if not (source.directory / CONFIG).is_file():
        raise ExportError(
            f"{model} is no checkpoint: it has no {CONFIG}; give the directory or the hub name of "
            "a LLaVA checkpoint"
        )
    return source


def checkpoint_files(directory: Path) -> list[Path]:
    """The files that a checkpoint is loaded from, sorted."""
    return sorted({path for pattern in FILES for path in directory.glob(pattern)})


def _download(model: str) -> Source:
    given = _HUB_NAME.fullmatch(model)
    if given is None or model.startswith("."):
        raise ExportError(
            f"{model} does not exist; give a checkpoint's directory, hub name or NAME@REVISION"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = given["name"], given["revision"]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"{model} is no directory here, and the hub does not give it: {reason}"
        ) from error
    directory = Path(folder).resolve()
    # The hub's client keeps a snapshot in a folder that is named by its commit.
    commit = directory.name if _COMMIT.fullmatch(directory.name) else None
    print(f"  {name} at commit {commit or 'unknown'}; NAME@COMMIT asks for the same again")
    return Source(directory, name, commit)
