"""What a built encoder was built for, so that a stale one is never served."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METADATA = "metadata.json"


@dataclass(frozen=True)
class EncoderMetadata:
    """Everything a vision encoder depends on: a difference in any field means building again."""

    format: str
    """"onnx" or "tensorrt"."""
    builder: str
    """Name of the package that built it."""
    builder_version: str
    compute_capability: str | None
    """Of the GPU, such as "8.6"; None for ONNX, which runs anywhere."""
    precision: str
    """"fp32" or "fp16"."""
    input_shape: tuple[int, int, int]
    """Pixel values of one tile: [3, H, W]."""
    output_shape: tuple[int, int]
    """Features of one tile: [T, D]."""
    max_batch: int
    checkpoint_sha256: str
    """Of the configuration, the vision tower and the projector."""
    exporter: str
    """SHA-256 over the code and the versions of the packages that wrote the graph."""

    @property
    def file_name(self) -> str:
        """The name Triton expects the encoder under."""
        return "model.plan" if self.format == "tensorrt" else "model.onnx"


def seal(directory: Path, metadata: EncoderMetadata) -> None:
    """Write the metadata of the encoder in `directory`, last of all.

    It lists the encoder's files with their SHA-256, so an encoder that was cut short, changed or
    exchanged does not look current.
    """
    files = {path.name: _sha256(path) for path in sorted(_encoder_files(directory, metadata))}
    text = json.dumps({"built_for": asdict(metadata), "files": files}, indent=2) + "\n"
    partial = directory / f"{METADATA}.partial"
    partial.write_text(text)
    os.replace(partial, directory / METADATA)


def is_current(directory: Path, wanted: EncoderMetadata) -> bool:
    """Whether `directory` holds a whole encoder that was built for exactly what is wanted."""
    sealed = read_metadata(directory)
    if sealed.get("built_for") != json.loads(json.dumps(asdict(wanted))):
        return False
    files: dict[str, str] = sealed["files"]
    return wanted.file_name in files and all(
        (directory / name).is_file() and _sha256(directory / name) == digest
        for name, digest in files.items()
    )


def read_metadata(directory: Path) -> dict[str, Any]:
    """The metadata of the encoder in `directory`; empty where there is none that can be read."""
    try:
        sealed = json.loads((directory / METADATA).read_text())
    except (OSError, ValueError):
        return {}
    intact = isinstance(sealed, dict) and isinstance(sealed.get("files"), dict)
    return sealed if intact else {}


def sealed_files(directory: Path) -> list[str]:
    """Names of the encoder's files, as its metadata lists them."""
    return list(read_metadata(directory).get("files", {}))


def _encoder_files(directory: Path, metadata: EncoderMetadata) -> list[Path]:
    names = (metadata.file_name, f"{metadata.file_name}.data")
    return [directory / name for name in names if (directory / name).exists()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
