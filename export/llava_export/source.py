"""Where a checkpoint comes from: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from llava_export.errors import ExportError
from llava_export.weights import CONFIG

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a checkpoint is loaded from; published ones hold the weights in other formats too."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def find_checkpoint(model: str) -> Path:
    """The directory of a checkpoint; downloads it if `model` is a hub name not seen before.

    Raises:
        ExportError: there is no such directory or hub name, or it holds no checkpoint.
    """
    directory = Path(model)
    if not directory.exists():
        directory = _download(model)
    directory = directory.resolve()
    if not (directory / CONFIG).is_file():
        raise ExportError(
            f"{model} is no checkpoint: it has no {CONFIG}; give the directory or the hub name of "
            "a LLaVA-1.5-family checkpoint"
        )
    return directory


def checkpoint_files(directory: Path) -> list[Path]:
    """The files that a checkpoint is loaded from, sorted."""
    return sorted({path for pattern in FILES for path in directory.glob(pattern)})


def _download(name: str) -> Path:
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ExportError(f"{name} does not exist; give a checkpoint's directory or hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"{name} is no directory here, and the hub does not give it: {reason}"
        ) from error
