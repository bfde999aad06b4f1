"""A session on its way back from the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llava_triton.engine.image_store import Digest
from llava_triton.journal.reading import Journaled


@dataclass(frozen=True)
class Resumed:
    """A session that was read from the journal."""

    found: Journaled
    features: Sequence[Tensor]
    """Of its pictures, in order."""
    digests: Sequence[Digest]
