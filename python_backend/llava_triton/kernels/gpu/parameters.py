"""How the GPU kernels cut their work: what a GPU is asked about before it is decided.

None of the numbers has been measured on a GPU. `make gpu-check STEP=1` tries others and writes the
best into a file; with its path in the environment variable `LLAVA_GPU_PARAMETERS` they are used.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

VARIABLE = "LLAVA_GPU_PARAMETERS"


@dataclass(frozen=True)
class Parameters:
    """What may be chosen by measuring; none changes what is computed, but for rounding."""

    min_split_tokens: int = 128
    """Keys and values of a program, short of the sequence: a multiple of 64."""
    decode_stages: int = 5
    """Of the pipeline in decoding, which loads two tiles ahead: one for the block table, and two
    each for keys and values."""
    decode_programs: int = 16
    """Programs of attention in decoding, for each of the GPU's multiprocessors, at the most."""
    prompt_splits: int = 4
    """Programs that share the keys and values of a prompt's rows, at the most; a power of two."""
    prompt_split_rows: int = 256
    """Rows of the longest prompts for which they do."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} is {value!r}; it must be a whole number above 0")
        if self.min_split_tokens % 64:
            raise ValueError(f"min_split_tokens is {self.min_split_tokens}, no multiple of 64")
        if self.prompt_splits & (self.prompt_splits - 1):
            raise ValueError(f"prompt_splits is {self.prompt_splits}, no power of two")

    @classmethod
    def from_json(cls, text: str) -> Parameters:
        """Of an object with some of the fields; the others stay as they are.

        Raises:
            ValueError: an unknown field, or a value that makes no sense.
        """
        values = json.loads(text)
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown parameters of the GPU kernels: {', '.join(unknown)}")
        return cls(**values)


@functools.cache
def parameters() -> Parameters:
    """Those of this process.

    Raises:
        ValueError: the file that the environment names cannot be used.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return Parameters()
    try:
        return Parameters.from_json(Path(path).read_text())
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{VARIABLE} is {path}, which cannot be used: {error}") from error
