"""A stage of `make gpu-check`: checkpoints with random weights, and repositories for Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu_check.pythons import ROOT
from benchmarks.gpu_check.stage import (
    MISTRAL,
    Options,
    checkpoint_folder,
    repository_folder,
    run_stage,
)
from benchmarks.gpu_check.ways import geometry_of
from benchmarks.workload import write_checkpoint


def export(checkpoint: Path, repository: Path, settings: dict[str, object]) -> None:
    """Fill a model repository.

    Raises:
        RuntimeError: it failed; the text is what the export said.
    """
    repository.parent.mkdir(parents=True, exist_ok=True)
    file = repository.with_suffix(".settings.json")
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "llava_export", "--model", str(checkpoint)]
    command += ["--output", str(repository), "--settings", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{checkpoint.name} cannot be exported: {done.stdout}{done.stderr}")


def prepare(options: Options) -> None:
    """The stage: a geometry's checkpoint; of the one that Triton serves, repositories, too."""
    place, folder = options.place, options.folder
    cpu = place.device.type == "cpu"

    def write(name: str) -> None:
        target = checkpoint_folder(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(target, geometry_of(name, cpu=cpu), place.dtype, place.device)
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        options.findings.add(f"{name}_bytes", size, f"{name}: {size / 1e9:.2f} GB of weights")

    def serve() -> None:
        settings = {
            "dtype": place.dtype_name,
            # Some more than are measured: a part that breaks leaves its own open.
            "max_sessions": place.sizes.many_sessions + 16,
            # What keeps a session that is measured from being encoded again would hide the encoder.
            "encoded_images_bytes": 1,
        }
        name = options.geometry
        export(checkpoint_folder(folder, name), repository_folder(folder, name), settings)

    def demo() -> None:
        export(ROOT / "demo" / "checkpoint", repository_folder(folder, "demo"), {})

    attempt = options.findings.attempt
    if options.geometry == MISTRAL:
        attempt("writing the checkpoint", lambda: write(options.geometry))
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(demo)  # on the CPU meanwhile
        attempt("writing the checkpoint", lambda: write(options.geometry))
        attempt("exporting the checkpoint", serve)
        attempt("exporting the demo checkpoint", coming.result)


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, prepare))
