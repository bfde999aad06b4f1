"""Which checkpoint it is, told in a moment also where it is tens of gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_BYTES = 8 * 1024 * 1024
"""A file of up to so many is read as a whole: configuration, tokenizer, chat template."""
_SAMPLES, _SAMPLE_BYTES = 128, 16 * 1024
_SUFFIXES = {".json", ".safetensors", ".jinja", ".model", ".txt"}


def checkpoint_identity(directory: Path) -> str:
    """A hash of a checkpoint's files: 64 hexadecimal digits.

    Of large files only the size and samples from all over them are read. Training changes every
    weight a little, so another model has another identity; one that differs in single weights alone
    may not.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
