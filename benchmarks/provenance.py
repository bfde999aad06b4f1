"""What every result says of itself: when, where, and with what it was measured."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
"""Where results go; those worth keeping are copied to `benchmarks/results/` and committed."""


def commit() -> str | None:
    """Of the checkout, where git knows it; with "-dirty" where files differ from it."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def about() -> dict[str, Any]:
    """Date, device, commit and versions."""
    # Not at the top: `benchmarks.gpu_check` runs where torch may be missing, and says so.
    import torch
    import transformers

    from benchmarks.limits import device_name
    from llava_triton.device import default_device

    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(default_device()),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def about_text(about: Mapping[str, Any]) -> str:
    """The same as a line for people."""
    geometry = f"geometry {about['geometry']}; " if "geometry" in about else ""
    return (
        f"{about['device']}, {about['date']}, commit {(about['commit'] or 'unknown')[:12]}; "
        f"{geometry}torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}\n"
    )


def write_results(
    output: Path, text: str, values: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Print a result, write it in both forms, and say where.

    Args:
        output: of the JSON; the text goes beside it.
        text: tables for people.
        values: every figure.
        about: see `about`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"about": about, **values}, indent=1) + "\n")
    told = f"{about_text(about)}\n{text.rstrip()}\n"
    output.with_suffix(".txt").write_text(told)
    print(f"\n{told}\nwritten to {output} and {output.with_suffix('.txt').name}", flush=True)
