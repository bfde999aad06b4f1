"""A stage of `make gpu-check`: checkpoints with random weights, and repositories for Triton."""

from __future__ import annotations

import shutil
import sys

from transformers import MistralConfig

from benchmarks.export import export
from benchmarks.gpu_check.stage import (
    MISTRAL,
    Options,
    checkpoint_folder,
    repository_folder,
    run_stage,
)
from benchmarks.workload import GEOMETRIES, QUICK, Geometry, write_checkpoint


def geometry_of(name: str, *, cpu: bool) -> Geometry:
    """The model of that name, or a tiny one of the same kind."""
    if not cpu:
        return GEOMETRIES[name]
    grouped = {"num_key_value_heads": 2, "sliding_window": None}
    if GEOMETRIES[name].family is MistralConfig:
        return Geometry(QUICK.vision, QUICK.text | grouped, MistralConfig)
    return QUICK


def write(options: Options) -> None:
    """The checkpoint of a stage's geometry, unless an earlier step has written it."""
    place, name = options.place, options.geometry
    target = checkpoint_folder(options.folder, name)
    if target.exists():
        return
    partial = target.with_name(f"{name}.partial")  # a step that is cut off leaves no half of one
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    geometry = geometry_of(name, cpu=place.device.type == "cpu")
    write_checkpoint(partial, geometry, place.dtype, place.device)
    partial.rename(target)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    options.findings.add(f"{name}_bytes", size, f"{name}: {size / 1e9:.2f} GB of weights")


def prepare(options: Options) -> None:
    """The stage: a geometry's checkpoint; of the one that Triton serves, its repository, too."""
    place, folder, name = options.place, options.folder, options.geometry

    def serve() -> None:
        settings = {
            "dtype": place.dtype_name,
            # Some more than are measured: a part that breaks leaves its own open.
            "max_sessions": place.sizes.many_sessions + 16,
            # What keeps a session that is measured from being encoded again would hide the encoder.
            "encoded_images_bytes": 1,
        }
        export(checkpoint_folder(folder, name), repository_folder(folder, name), settings)

    options.findings.attempt("writing the checkpoint", lambda: write(options))
    if name != MISTRAL:
        options.findings.attempt("exporting the checkpoint", serve)


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, prepare))
