"""A session: what was said in it, and what of that is remembered as keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_triton.engine.block_pool import BlockKey
from llava_triton.engine.image_store import Image
from llava_triton.engine.pages import HostBlocks
from llava_triton.protocol import NO_TENANT

SessionId = int | str
"""Triton's correlation ID: 7 and "7" are two sessions."""


@dataclass(eq=False)
class HostCopy:
    """Keys and values of a session in host memory."""

    bytes: int
    tensors: HostBlocks | None = None
    """As `Pages.to_host` gives them; filled in by the device thread."""
    failed: bool = False
    """Whether the device thread could not make the copy."""


@dataclass(eq=False)
class KeyValues:
    """What is remembered of a session's tokens: in blocks, or as a copy in host memory.

    `SessionMemory` alone changes it.
    """

    ids: list[int] = field(default_factory=list)
    """The tokens whose keys and values exist."""
    blocks: list[int] = field(default_factory=list)
    """The block table: at least as many as `ids` need; empty while they are in host memory."""
    keys: list[BlockKey] = field(default_factory=list)
    """Of the blocks that `ids` fill."""
    host: HostCopy | None = None
    dropped: bool = False
    """Whether they were forgotten under pressure and have not been needed since."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Session:
    """One open session. Only the engine's thread touches it.

    A session opened again under the same ID is another object, and a turn holds the object: what
    belonged to the earlier one can never reach the later.
    """

    id: SessionId
    opened_at: float
    """Seconds, by the engine's clock."""
    last_used_at: float
    tenant: str = NO_TENANT
    """Who opened it: nobody else can use it, nor find what it has computed."""
    history: list[int] = field(default_factory=list)
    """Token IDs up to the end of the last answer."""
    last_answer: str | None = None
    """Text of the last answer; None before the first."""
    pending_images: int = 0
    """Images that came without a question since the last answer."""
    images: list[Image] = field(default_factory=list)
    """Every picture of the conversation, in order."""
    key_values: KeyValues = field(default_factory=KeyValues)

    def reusable_prefix(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens are remembered."""
        length = 0
        for remembered, wanted in zip(self.key_values.ids, prompt, strict=False):
            if remembered != wanted:
                break
            length += 1
        return length
