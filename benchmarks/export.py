"""Model repositories for the benchmarks: by the same command that users export with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.findings import ROOT

DEMO = ROOT / "demo" / "checkpoint"


def export(checkpoint: Path, repository: Path, settings: dict[str, Any]) -> None:
    """Export a checkpoint with these settings, unless that is there already.

    Raises:
        ExportFailedError: it failed; the text is what the export said.
    """
    repository.parent.mkdir(parents=True, exist_ok=True)
    file = repository.parent / f"{repository.name}.settings.json"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "llava_export", "--model", str(checkpoint)]
    command += ["--output", str(repository), "--settings", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ExportFailedError(f"{checkpoint} cannot be exported: {done.stdout}{done.stderr}")


class ExportFailedError(RuntimeError):
    """A checkpoint could not be exported."""
