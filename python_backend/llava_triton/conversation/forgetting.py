"""What of a conversation is forgotten where the context has no room for all of it.

Turns are forgotten whole, the oldest first: what is left is a conversation as if those had not been
there. These stay:

- the first turn, because it has what the system said, and most often the picture,
- every turn that showed a picture: without its question and answer the picture would say less.

So much is forgotten at once that not every turn has to be computed again with all that follows what
is forgotten: of the room that those leave, half is free afterwards, the new message included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_triton.conversation.prompt import CompletedTurn, Prompt, Span
from llava_triton.conversation.renderer import Past

KEPT_SHARE = 2
"""Kept turns and the new message may take 1 / KEPT_SHARE of the room."""
ANSWER_SHARE = 4
"""An answer has one part in so many of the room at least: turns are forgotten where it would not.
What it may have does not count, so that a conversation forgets the same however it is told."""


@dataclass(frozen=True)
class NewMessage:
    """What a conversation has to have room for."""

    message: int
    """Tokens."""
    asks: bool
    """Whether it wants an answer."""


def turns_to_forget(turns: Sequence[CompletedTurn], new: NewMessage, context: int) -> list[int]:
    """Which of a conversation's turns to forget, so that a new one fits.

    Args:
        turns: of the conversation, in order.
        new: the turn behind them.
        context: tokens of a conversation at the most.

    Returns:
        Their indices, ascending; none where all fits, or where nothing can be forgotten. What is
        left may still be too long.
    """
    sizes = _sizes(turns)
    kept = _kept(sizes, range(len(sizes)), new, context)
    return sorted(set(range(len(sizes))) - set(kept))


def without(past: Past, forgotten: Sequence[int]) -> Past:
    """A conversation without some of its turns, which have no pictures."""
    gone = set(forgotten)
    prompt, start = Prompt(), 0
    turns: list[CompletedTurn] = []
    for index, turn in enumerate(past.turns):
        if index not in gone:
            shift = len(prompt) - start
            spans = [span for span in past.prompt.spans if start <= span.start < turn.end]
            moved = [Span(span.start - start, span.length) for span in spans]
            prompt.append(Prompt(past.prompt.ids[start : turn.end], moved))
            turns.append(replace(turn, asked=turn.asked + shift, end=turn.end + shift))
        start = turn.end
    return Past(prompt, tuple(turns), past.forgotten + len(gone))


def as_it_went(past: Past, new: NewMessage, context: int) -> Past:
    """What would be left of a conversation now, had each of its turns been a new one.

    So of a conversation that comes whole each time, and longer each time, the same turns are
    forgotten each time: what follows them need not be computed again.
    """
    sizes = _sizes(past.turns)
    kept: list[int] = []
    start = 0
    for index, turn in enumerate(past.turns):
        asked = NewMessage(turn.asked - start, asks=True)
        kept = [*_kept(sizes, kept, asked, context), index]
        start = turn.end
    kept = _kept(sizes, kept, new, context)
    return without(past, sorted(set(range(len(sizes))) - set(kept)))


@dataclass(frozen=True)
class _Size:
    """What matters here of a turn."""

    length: int
    """Tokens of its message and its answer."""
    stays: bool


def _sizes(turns: Sequence[CompletedTurn]) -> list[_Size]:
    sizes: list[_Size] = []
    end = images = 0
    for turn in turns:
        sizes.append(_Size(turn.end - end, not sizes or turn.images > images))
        end, images = turn.end, turn.images
    return sizes


def _kept(sizes: Sequence[_Size], kept: Sequence[int], new: NewMessage, context: int) -> list[int]:
    """Which turns are still kept before a new one, of those that were kept until now."""
    all_tokens = new.message + sum(sizes[index].length for index in kept)
    if all_tokens + context // ANSWER_SHARE <= context:
        return list(kept)
    stay = {index for index in kept if sizes[index].stays}
    if kept and not new.asks:
        stay.add(kept[-1])  # it may be asked again
    stay_tokens = sum(sizes[index].length for index in stay)
    room, left = max(0, context - stay_tokens), all_tokens - stay_tokens
    if left + (room // ANSWER_SHARE if new.asks else 0) <= room:
        return list(kept)
    still = []
    for index in kept:
        if index in stay or left * KEPT_SHARE <= room:
            still.append(index)
        else:
            left -= sizes[index].length
    return still
