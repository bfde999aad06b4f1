"""What the language model reads: token IDs, and which of them are pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """The tokens of one picture: as many as its features have rows."""

    start: int
    """Position of the first one."""
    length: int
    """At least 1."""

    @property
    def end(self) -> int:
        """Position behind the last one."""
        return self.start + self.length


@dataclass(frozen=True)
class CompletedTurn:
    """Where a question that was answered stands in its conversation."""

    asked: int
    """Tokens of the conversation up to where the answer begins."""
    end: int
    """Tokens up to the end of the answer."""
    images: int
    """Pictures of the conversation up to there."""
    pending: int
    """How many of them were there, and not asked about yet, when the question came."""
    answer: str
    """Its text."""
    number: int
    """How many questions were answered before it, those that are forgotten included."""


@dataclass
class Prompt:
    """Token IDs and the spans of the pictures among them."""

    ids: list[int] = field(default_factory=list)
    """Where a picture is, the image placeholder's ID."""
    spans: list[Span] = field(default_factory=list)
    """In order; no two overlap."""

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, other: Prompt) -> None:
        """Put another prompt behind this one."""
        before = len(self.ids)
        self.spans += [Span(before + span.start, span.length) for span in other.spans]
        self.ids += other.ids


def expanded(ids: Sequence[int], placeholder: int, lengths: Sequence[int]) -> Prompt:
    """Token IDs with one placeholder a picture -> with as many as each picture has tokens.

    Args:
        ids: of a text as a chat template renders it.
        placeholder: the ID that stands for a picture.
        lengths: tokens of each picture, in order.

    Raises:
        ValueError: there are more placeholders than lengths, or fewer.
    """
    places = [place for place, token in enumerate(ids) if token == placeholder]
    if len(places) != len(lengths):
        raise ValueError(
            f"the checkpoint's chat template rendered {len(places)} image placeholders for "
            f"{len(lengths)} images"
        )
    prompt, read = Prompt(), 0
    for place, length in zip(places, lengths, strict=True):
        prompt.ids += ids[read:place]
        prompt.spans.append(Span(len(prompt.ids), length))
        prompt.ids += [placeholder] * length
        read = place + 1
    prompt.ids += ids[read:]
    return prompt
