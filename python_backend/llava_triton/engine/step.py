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
    """A stretch of one picture's features."""

    image: Image
    first: int
    last: int


@dataclass(frozen=True)
class StepPart:
    """The tokens of one sequence in a step."""

    ids: Sequence[int]
    """At least one, image placeholders among them; or alone what `token_after` gives."""
    context: int
    """Tokens of the sequence that are in its blocks when the step begins."""
    blocks: Sequence[int]
    """Its block table, long enough for `ids`."""
    image_rows: Sequence[ImageRows] = ()
    """As many features as `ids` has placeholders, in order."""
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


def step_part(
    ids: Sequence[int],
    session: Session,
    under_way: int,
    draw: Draw | None,
    image_token_id: int,
    tokens_per_image: int,
) -> StepPart:
    """The tokens `ids` of a session behind those it remembers, with the pictures among them.

    Args:
        ids: not empty.
        session: whose blocks have room for them.
        under_way: tokens behind those it remembers that the step under way computes.
        draw: of the token after them.
        image_token_id: the placeholder in `ids`.
        tokens_per_image: placeholders of one picture.
    """
    kv = session.key_values
    rows = []
    count = ids.count(image_token_id)
    if count:
        first = kv.ids.count(image_token_id)
        last = first + count
        while first < last:
            number, offset = divmod(first, tokens_per_image)
            end = min(tokens_per_image, offset + last - first)
            rows.append(ImageRows(session.images[number], offset, end))
            first += end - offset
    return StepPart(ids, len(kv) + under_way, list(kv.blocks), rows, draw)
