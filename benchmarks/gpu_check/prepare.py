"""A stage of `make gpu-check`: checkpoints with random weights, and repositories for Triton."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from transformers import MistralConfig

from benchmarks.export import DEMO, export
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


def prepare(options: Options) -> None:
    """The stage: a geometry's checkpoint; of the one that Triton serves, repositories, too."""
    place, folder = options.place, options.folder
    cpu = place.device.type == "cpu"

    def write(name: str) -> None:
        target = checkpoint_folder(folder, name)
        if (target / "config.json").exists():
            return  # by the step before
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
        export(DEMO, repository_folder(folder, "demo"), {})

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
