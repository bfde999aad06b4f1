"""A session: what was said in it, and what of that the device remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_triton.engine.model_runner import KeyValues

SessionId = int | str
"""Triton's correlation ID: 7 and "7" are two sessions."""


@dataclass(eq=False)
class Session:
    """One open session. Only the engine's thread touches it.

    A session opened again under the same ID is another object, and a turn holds the object: what
    belonged to the earlier one can never reach the later.

    Lengths are derived: the device holds `len(key_values)` tokens, which are `cached_ids`.
    """

    id: SessionId
    opened_at: float
    """Seconds, by the engine's clock."""
    last_used_at: float
    history: list[int] = field(default_factory=list)
    """Token IDs up to the end of the last answer."""
    last_answer: str | None = None
    """Text of the last answer; None before the first."""
    pending_images: int = 0
    """Images that came without a question since the last answer."""
    image_features: list[Tensor] = field(default_factory=list)
    """One [N * T, D] tensor per turn that brought images, on the device."""
    cached_ids: list[int] = field(default_factory=list)
    key_values: KeyValues = field(default_factory=KeyValues)

    def reusable_prefix(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens the device still remembers."""
        length = 0
        for cached, wanted in zip(self.cached_ids, prompt, strict=False):
            if cached != wanted:
                break
            length += 1
        return length

    def truncate(self, length: int) -> None:
        """Make the device forget every token from position `length` on."""
        self.key_values.truncate(length)
        del self.cached_ids[length:]

    def free(self) -> None:
        """Give back all memory on the device at once, whoever still refers to this object."""
        self.truncate(0)
        self.image_features.clear()

    def features_between(self, first: int, last: int) -> Tensor:
        """Rows [last - first, D] of the session's image features, counted over all its images."""
        return torch.cat(self.image_features)[first:last]
