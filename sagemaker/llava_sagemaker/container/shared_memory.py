"""Whether /dev/shm has room for what Triton's Python models hand to one another."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from llava_triton.contract.settings import Settings

SHARED_MEMORY = Path("/dev/shm")
MIB = 1024 * 1024
REGION_BYTES = 2 * MIB
"""Of each Python model, before anything passes through it: one, and what it grows by."""
PICTURES_AT_ONCE = 4
"""Pictures of different sessions on their way at once: as many as image_encoder decodes."""


def needed_bytes(repository: Path) -> int:
    """Shared memory that opening sessions wants at the most, in usual use.

    A picture passes as its file, as pixel values and as features; features leave one model's region
    and enter another's. Where there is less, a picture may be refused with an error, no more.
    """
    models = len(list(repository.glob("*/1/model.py")))
    config = text_format.Parse(
        (repository / "vision_encoder" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    tensors = [*config.input, *config.output]
    # Of one picture: the number of pictures, the first dimension, is -1.
    numbers: int = sum(math.prod(size for size in each.dims if size > 0) for each in tensors)
    file_bytes: int = min(Settings.of_repository(repository).max_image_bytes, 6 * MIB)
    return models * REGION_BYTES + PICTURES_AT_ONCE * (2 * 4 * numbers + file_bytes)


def warning(repository: Path, place: Path = SHARED_MEMORY) -> str | None:
    """A sentence for the log where `place` is small; None where there is room."""
    needed, free = needed_bytes(repository), shutil.disk_usage(place).free
    if free >= needed:
        return None
    return (
        f"{place} has {free // MIB} MiB free and {PICTURES_AT_ONCE} pictures at once may need "
        f"{-(-needed // MIB)}; more of them at the same time may be refused. Where you can, give "
        f"the container more: docker run --shm-size={-(-needed // MIB)}m"
    )
