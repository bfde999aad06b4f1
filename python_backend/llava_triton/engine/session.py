"""A session: what was said in it, and what of that is remembered as keys and values."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llava_triton.contract.protocol import NO_TENANT
from llava_triton.contract.sampling_parameters import Truncation
from llava_triton.conversation.forgetting import without
from llava_triton.conversation.prompt import CompletedTurn, Prompt, Span
from llava_triton.conversation.renderer import Past
from llava_triton.engine.block_pool import BlockKey
from llava_triton.engine.image_store import Image
from llava_triton.model.kv_pages import HostBlocks

if TYPE_CHECKING:
    from llava_triton.journal.writer import Log

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

    computed: int = 0
    """How many of the session's first tokens have keys and values."""
    blocks: array[int] = field(default_factory=lambda: array("i"))
    """The block table: at least as many as these need; empty while they are in host memory. Every
    step copies it, at once and not number by number."""
    keys: list[BlockKey] = field(default_factory=list)
    """Of the blocks that these fill."""
    host: HostCopy | None = None
    dropped: bool = False
    """Whether they were forgotten under pressure and have not been needed since."""


@dataclass(frozen=True, eq=False)
class PictureSpan(Span):
    """The tokens of one picture of a session."""

    image: Image


@dataclass(frozen=True)
class Mark:
    """A place in a session where a turn can begin: behind so many completed turns."""

    turns: int
    committed: int
    """Tokens up to the end of the last of them."""
    length: int
    """Those, and the tokens that the next message begins with."""
    images: int
    """Pictures up to there."""
    pending: int
    """Those of them that nobody has asked about."""
    last_answer: str | None
    """Text of the last answer; None before the first."""
    forgotten: int
    """Turns before it that are forgotten."""


@dataclass(frozen=True, eq=False)
class TakenBack:
    """What a session had behind a mark that it went back to."""

    mark: Mark
    tokens: list[int]
    """From `mark.committed` on, and so the others."""
    spans: list[PictureSpan]
    turns: list[CompletedTurn]
    images: list[Image]
    """From `mark.images` on; the session still holds them."""
    pending_images: int
    forgotten: int


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
    tokens: list[int] = field(default_factory=list)
    """Of the whole conversation, the turn in flight included. The first `committed` of them are
    there to stay; the keys and values of the first `key_values.computed` exist."""
    spans: list[PictureSpan] = field(default_factory=list)
    """The pictures among `tokens`, in order."""
    turns: list[CompletedTurn] = field(default_factory=list)
    """Those that were answered, in order: where each ends is where the session can go back to."""
    images: list[Image] = field(default_factory=list)
    """Every picture of the conversation, in order. The last ones may have no tokens."""
    pending_images: int = 0
    """Those of them that came without a question since the last answer."""
    forgotten: int = 0
    """Turns that were answered and are forgotten, because the context was full."""
    truncation: Truncation = "disabled"
    """What becomes of the session when its context is full, where a turn does not say."""
    key_values: KeyValues = field(default_factory=KeyValues)
    asked: int | None = None
    """Where the answer in flight begins; None: the session gives none."""
    taken_back: TakenBack | None = None
    """What the turn in flight has taken back: all of it is there again if that turn fails."""
    log: Log | None = None
    """What of it is in the journal; None where the server keeps none."""

    @property
    def committed(self) -> int:
        """Tokens up to the end of the last answer. Those of pictures that came without a question
        since are behind them, and the next message begins with the same."""
        return self.turns[-1].end if self.turns else 0

    @property
    def answered(self) -> int:
        """Turns that were answered, the forgotten ones included."""
        return len(self.turns) + self.forgotten

    @property
    def held_images(self) -> list[Image]:
        """Every picture that the session holds."""
        return self.images + (self.taken_back.images if self.taken_back else [])

    def mark(self, turns: int) -> Mark:
        """Where the question behind so many completed turns came: what was shown before it without
        a question is there. Where these are all, the session as it is."""
        last = self.turns[turns - 1] if turns else None
        pending = self.turns[turns].pending if turns < len(self.turns) else self.pending_images
        images = (last.images if last else 0) + pending
        committed = last.end if last else 0
        shown = self.spans[:images]
        length = max(committed, shown[-1].end) if shown else committed
        answer = last.answer if last else None
        at_end = turns == len(self.turns)
        forgotten = self.forgotten if at_end else self.turns[turns].number - turns
        return Mark(turns, committed, length, images, pending, answer, forgotten)

    def mark_behind(self, answered: int) -> Mark:
        """Where the question behind so many answered ones came, the forgotten ones included. Where
        it is forgotten itself, what is left of those before it."""
        turns = bisect_left(self.turns, answered, key=lambda turn: turn.number)
        mark = self.mark(turns)
        if mark.turns + mark.forgotten == answered:
            return mark
        # No picture came with a forgotten question, and what is pending came behind it.
        images = mark.images - mark.pending
        forgotten = answered - turns
        return replace(mark, length=mark.committed, images=images, pending=0, forgotten=forgotten)

    def last_question(self) -> Mark | None:
        """Where the last answer begins, which may be in flight; None: there is none."""
        if self.asked is not None:
            return replace(self.mark(len(self.turns)), length=self.asked, images=len(self.images))
        if not self.turns or self.turns[-1].number + 1 < self.answered:
            return None
        turn = self.turns[-1]
        mark = self.mark(len(self.turns) - 1)
        return replace(mark, length=turn.asked, images=turn.images)

    def message_at(self, mark: Mark) -> Prompt:
        """The message that ends at a mark."""
        first = mark.committed
        shown = self.pictures(first, mark.length)
        spans = [Span(span.start - first, span.length) for span in shown]
        return Prompt(self.tokens[first : mark.length], spans)

    def turn_length(self, index: int) -> int:
        """Tokens of a turn's message and answer."""
        return self.turns[index].end - (self.turns[index - 1].end if index else 0)

    def pending_lengths(self, mark: Mark) -> list[int]:
        """Tokens of each picture that is pending at a mark."""
        return [image.tokens for image in self.images[mark.images - mark.pending : mark.images]]

    def go_back(self, mark: Mark) -> None:
        """Forget what is behind a mark, but for `come_back`."""
        first = mark.committed
        self.taken_back = TakenBack(
            mark,
            tokens=self.tokens[first:],
            spans=[span for span in self.spans if span.start >= first],
            turns=self.turns[mark.turns :],
            images=self.images[mark.images :],
            pending_images=self.pending_images,
            forgotten=self.forgotten,
        )
        self.truncate(mark.length)
        del self.turns[mark.turns :]
        del self.images[mark.images :]
        self.pending_images = mark.pending
        self.forgotten = mark.forgotten

    def forget(self, forgotten: Sequence[int], mark: Mark) -> None:
        """Forget some of the turns before a mark, and what is behind it, but for `come_back`.

        Args:
            forgotten: indices of turns without pictures, ascending.
            mark: behind them.
        """
        first = self.mark(forgotten[0])
        images = self.images[first.images : mark.images]
        ids, spans = self.tokens[: mark.committed], self.pictures(0, mark.committed)
        past = Past(Prompt(ids, list(spans)), tuple(self.turns[: mark.turns]), mark.forgotten)
        left = without(past, forgotten)
        self.go_back(first)
        kept = [Span(span.start - first.committed, span.length) for span in left.prompt.spans]
        self.images += images
        self.append(Prompt(left.prompt.ids[first.committed :], kept[len(self.spans) :]))
        self.turns += left.turns[first.turns :]
        self.pending_images, self.forgotten = mark.pending, left.forgotten

    def come_back(self) -> None:
        """Be as before `go_back`, if that was called."""
        back, self.taken_back = self.taken_back, None
        if back is None:
            return
        self.truncate(back.mark.committed)
        self.tokens += back.tokens
        self.spans += back.spans
        del self.turns[back.mark.turns :]
        self.turns += back.turns
        del self.images[back.mark.images :]
        self.images += back.images
        self.pending_images, self.forgotten = back.pending_images, back.forgotten

    def copy(self, other: Session, mark: Mark) -> None:
        """Begin as another session up to a mark; whoever calls this holds the pictures."""
        self.tokens = other.tokens[: mark.length]
        self.images = other.images[: mark.images]
        self.spans = [span for span in other.spans if span.end <= mark.length]
        self.turns = other.turns[: mark.turns]
        self.pending_images, self.forgotten = mark.pending, mark.forgotten
        self.truncation = other.truncation

    def append(self, message: Prompt) -> None:
        """Put tokens behind all others; their pictures are the next ones of `images`."""
        before = len(self.tokens)
        for span in message.spans:
            image = self.images[len(self.spans)]
            self.spans.append(PictureSpan(before + span.start, span.length, image))
        self.tokens += message.ids

    def replace_message(self, message: Prompt) -> int:
        """Put a message in the place of what is not committed.

        Returns:
            How many of all tokens stayed where they were.
        """
        kept = self.committed + common_prefix(self.tokens[self.committed :], message.ids)
        self.truncate(self.committed)
        self.append(message)
        return kept

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on, and every picture that lacks one then.

        What is remembered of them as keys and values is `SessionMemory.truncate`'s.
        """
        while self.spans and self.spans[-1].end > length:
            length = min(length, self.spans.pop().start)
        del self.tokens[length:]

    def pictures(self, start: int, end: int) -> Iterator[PictureSpan]:
        """The pictures with tokens at the positions from `start` to `end`, `end` excluded."""
        first = bisect_right(self.spans, start, key=lambda span: span.end)
        for index in range(first, len(self.spans)):
            if self.spans[index].start >= end:
                return
            yield self.spans[index]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists have in common before they differ."""
    length = 0
    for mine, others in zip(one, other, strict=False):
        if mine != others:
            break
        length += 1
    return length
