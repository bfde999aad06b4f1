"""Which machine this is, as JSON: asked in a process of its own, so that none stays on the GPU."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "transformers", "triton", "onnxruntime", "numpy"),
    *("nvidia-pytriton", "tritonclient", "grpcio", "protobuf"),
)


def machine() -> dict[str, Any]:
    """Device, driver and versions; `device` is None without an NVIDIA GPU that torch can use."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": device,
        "memory_gib": _memory_gib() if device else None,
        "driver": _driver() if device else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "libpython": _has_libpython(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _memory_gib() -> float:
    import torch

    return round(torch.cuda.get_device_properties(0).total_memory / (1 << 30), 1)


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _has_libpython() -> bool:
    """Whether this Python is there as a library, too."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    if (Path(sysconfig.get_config_var("LIBDIR")) / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    json.dump(machine(), sys.stdout)
