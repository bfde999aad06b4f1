"""One step of the device: what it computes, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llava_triton.engine.image_store import Image
from llava_triton.engine.session import Session
from llava_triton.engine.session_memory import Transfer
from llava_triton.sampling import Draw


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
    draw: Draw | None = None
    """How the token after the last one is drawn; None: the likeliest."""


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


def step_part(ids: Sequence[int], session: Session, under_way: int, draw: Draw | None) -> StepPart:
    """The tokens `ids` of a session behind those it remembers, with the pictures among them.

    Args:
        ids: not empty.
        session: whose blocks have room for them.
        under_way: tokens behind those it remembers that the step under way computes.
        draw: of the token after them.
    """
    start = session.key_values.computed + under_way
    end = start + len(ids)
    rows = []
    for span in session.pictures(start, end):
        first, last = max(start, span.start), min(end, span.end)
        rows.append(ImageRows(first - start, span.image, first - span.start, last - span.start))
    return StepPart(ids, start, list(session.key_values.blocks), rows, draw)
