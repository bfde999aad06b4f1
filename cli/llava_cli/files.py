"""Where the demo's files and the exported model repositories lie."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "llava-triton"
SHARED = _CHECKOUT if (_CHECKOUT / "demo" / "checkpoint").is_dir() else _INSTALLED
"""What has `demo/checkpoint`, `demo/conversation.json` and `examples/pictures`: the checkout, or
where the wheel puts them."""
DEMO = "demo"
"""The model that comes with the package."""


def example_pictures() -> list[Path]:
    """Pictures that the demo checkpoint understands."""
    return sorted((SHARED / "examples" / "pictures").glob("*.*"))


def is_repository(model: str) -> bool:
    """Whether a model is named by a model repository that was exported already."""
    return any(Path(model).glob("*/config.pbtxt"))


def checkpoint_of(model: str) -> str:
    """What the export is to be given for a model's name."""
    return str(SHARED / "demo" / "checkpoint") if model == DEMO else model


def repositories() -> Path:
    """The folder for exported model repositories: LLAVA_REPOSITORIES, else in the user's cache."""
    if named := os.environ.get("LLAVA_REPOSITORIES"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "llava-triton" / "repositories"


def repository_of(model: str) -> Path:
    """Where a model is exported to unless told otherwise. The whole name, so that no two models
    share a repository."""
    readable = re.sub(r"[^\w.-]", "-", model)
    return repositories() / (DEMO if model == DEMO else f"model-{readable}")
