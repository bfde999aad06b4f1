"""One step of the device: what it computes, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llava_triton.model.logits_processors import LogitsChange
from llava_triton.model.logprobs import TokenLogprobs
from llava_triton.model.sampling import Draw

Transfer = Callable[[], None]
"""A move of blocks, to be done on the device thread before the next step."""


class Image(Protocol):
    """A picture whose features may move between two steps."""

    features: Tensor
    """[T, D], on the device or in host memory."""


@dataclass(frozen=True)
class ImageRows:
    """A stretch of one picture's features, in the place of tokens."""

    at: int
    """Which of the part's tokens is the first one."""
    image: Image
    first: int
    last: int
    """Rows of the features, `last` excluded."""


@dataclass(frozen=True)
class Choice:
    """How the token behind a part's last one is chosen; by default it is the likeliest one."""

    draw: Draw | None = None
    change: LogitsChange | None = None
    logprobs: int | None = None
    """Of how many likeliest tokens the log probabilities are told, beside the chosen one's; None:
    none at all."""


@dataclass(frozen=True)
class StepPart:
    """The tokens of one sequence in a step."""

    ids: Sequence[int]
    """At least one; or alone what `token_after` gives."""
    context: int
    """Tokens of the sequence that are in its blocks when the step begins."""
    blocks: Sequence[int]
    """Its block table, long enough for `ids`."""
    image_rows: Sequence[ImageRows] = ()
    """What is computed in the place of some of `ids`, in order."""
    choice: Choice = Choice()
    """Of the token after the last one."""


@dataclass(frozen=True)
class Step:
    """Sequences that advance together, after the moves of blocks that were planned before."""

    parts: Sequence[StepPart]
    transfers: Sequence[Transfer] = field(default_factory=tuple)


@dataclass(frozen=True)
class StepResult:
    """What follows each part's last token."""

    tokens: list[int]
    """Their IDs, one for each part; of no meaning where a part's prompt goes on."""
    seconds: float
    """The device's time, without the moves."""
    logprobs: list[TokenLogprobs | None]
    """One for each part; None where its choice asks for none."""


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device computes, or will when it has done with those before."""

    wait: Callable[[], StepResult]
    """Returns when it is done; for any thread."""


class TransferError(RuntimeError):
    """A move of blocks failed; the step was not computed."""


def token_after(row: int) -> int:
    """In place of a token's ID: the one that follows this row of the step launched before, which
    nobody but the device needs to know yet."""
    return -1 - row
