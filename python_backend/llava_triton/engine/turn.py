"""A turn: what a client asked, how far its answer is, and what it cost."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from llava_triton.contract.delta import Delta, FinishReason
from llava_triton.contract.errors import SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.operations import NO_OPERATION, Operation
from llava_triton.contract.positions import Positions
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.conversation.detokenizer import Detokenizer
from llava_triton.conversation.grammar import Grammar
from llava_triton.conversation.prompt import CompletedTurn, Prompt
from llava_triton.conversation.renderer import Past
from llava_triton.conversation.token_texts import TokenTexts
from llava_triton.engine.image_store import Digest
from llava_triton.engine.session import Mark, Session, SessionId
from llava_triton.model.logits_processors import LogitsProcessors
from llava_triton.model.logprobs import TokenLogprobs
from llava_triton.model.sampling import Draws, SamplingParameters
from llava_triton.model.step import Choice

if TYPE_CHECKING:
    from llava_triton.engine.resumed import Resumed

Listener = Callable[[Delta | SessionError], None]
"""Called on the engine's thread: pieces of the answer in order, the last one final, or an error."""


@dataclass(frozen=True, eq=False)  # tensors do not compare
class TurnRequest:
    """One turn of one session, checked as far as it can be without the session."""

    session_id: SessionId
    start: bool = False
    """Open the session; an open one of this ID is closed first."""
    end: bool = False
    """Close the session when the turn has been answered."""
    text: str | None = None
    image_features: tuple[Tensor, ...] = ()
    """Of each picture [T, D], any float dtype and device: those of `history`, then this turn's.
    A picture is as many tokens as it has rows."""
    image_positions: Positions = None
    """Where this turn's pictures stand in its text."""
    history: tuple[PastTurn, ...] = ()
    """What was said before; only where `start`."""
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    tenant: str = NO_TENANT
    """Whose turn it is: a session is its tenant's alone, and shares with others of his alone."""
    operation: Operation = NO_OPERATION
    """What is done to the session first."""
    request_id: str = ""
    """Its client's name for it; "": it has none."""

    @property
    def has_message(self) -> bool:
        """Whether it says or shows anything."""
        return self.text is not None or bool(self.image_features) or bool(self.history)

    @property
    def is_asked(self) -> bool:
        """Whether there is something to answer."""
        return self.text is not None or self.operation.regenerate

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.has_message or self.operation.regenerate)

    @property
    def only_ends(self) -> bool:
        """Whether it closes a session and does nothing else."""
        return self.end and not self.start and self.is_empty

    def on_open_session(self) -> TurnRequest:
        """The same turn, now that its session was resumed."""
        return replace(self, start=False, operation=replace(self.operation, resume=False))

    @property
    def features_bytes(self) -> int:
        """Of its pictures' features."""
        return sum(features.nbytes for features in self.image_features)


@dataclass(frozen=True)
class Prepared:
    """What takes long about a turn and needs nothing of the engine's state."""

    past: Past
    """What was said elsewhere before, where the turn opens its session."""
    message: Prompt
    """What the turn adds, pending images included."""
    digests: Sequence[Digest] = ()
    """Of its pictures."""
    grammar: Grammar | None = None
    """Of its answer, where that must have a form."""


@dataclass(eq=False)
class QueuedTurn:
    """A turn in its session's lane, from its arrival to its end."""

    request: TurnRequest
    listener: Listener
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived_at: float = field(default_factory=time.monotonic)
    told_at: float = field(default_factory=time.monotonic)
    """When its listener last heard of it."""
    asked_for: bool = True
    """Whether a client waits for it, and so whether it counts."""
    preparation: Future[Prepared] | None = None
    """What a thread beside the engine's makes of it; None before it is first in its lane."""
    resuming: Future[Resumed] | None = None
    """Its session, which is being read from the journal; None where it need not be."""

    def forget_features(self) -> None:
        """The session has them: the request's own memory goes free."""
        self.request = replace(self.request, image_features=())

    @property
    def is_over_time(self) -> bool:
        """Whether it has taken longer than its client gives it."""
        limit = self.request.sampling.max_seconds
        return limit is not None and time.monotonic() - self.arrived_at >= limit


def closing_turn(turn: QueuedTurn) -> QueuedTurn:
    """A turn that ends another one's session and that nobody waits for."""
    ending = TurnRequest(turn.request.session_id, end=True, tenant=turn.request.tenant)
    return QueuedTurn(ending, lambda _: None, asked_for=False)


class Phase(Enum):
    """How far a running turn is."""

    NEW = "no step has been planned for it"
    COMPUTING = "its session has the blocks it needs to go on"
    PUT_BACK = "an older turn has its session's blocks"


@dataclass(eq=False)
class RunningTurn:
    """A turn that is being computed: the prompt first, then one token at a time.

    Its tokens are its session's, from the first one that is not committed.
    """

    turn: QueuedTurn
    session: Session
    prompt_tokens: int
    """Of the conversation, up to where the answer begins."""
    mark: Mark
    """Where it begins in its session."""
    forgets: Sequence[int]
    """Indices of the turns that its session forgets first."""
    kept_mark: Mark
    """What of its session it leaves as it is: up to `mark`, or to the first turn that it forgets.
    """
    max_tokens: int
    """0 where the turn has no text: the prompt is computed and nothing is sampled."""
    draws: Draws
    processors: LogitsProcessors
    detokenizer: Detokenizer
    token_texts: TokenTexts
    grammar: Grammar | None
    """What the answer must be. Each of its tokens is chosen when those before are known."""
    pending_images: int
    """Images that the session has to be asked about when the turn is done."""
    kept: int = 0
    """How many of its tokens the session had before: it goes back to them if the turn fails."""
    phase: Phase = Phase.NEW
    cached_tokens: int = 0
    """How many prompt tokens were not computed for this turn: the session remembered them, or they
    came from blocks of other sessions. Settled when its first step is planned."""
    unread: int = 0
    """How many of the answer's last tokens are not detokenized yet."""
    unread_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of those; empty where none are asked for."""
    told_logprobs: list[str] = field(default_factory=list)
    """Of the tokens detokenized since the last piece."""
    finish_reason: FinishReason = ""
    """Set when the last token has been computed."""
    first_token_at: float | None = None
    last_token_at: float = 0.0
    journaled: bool = False
    """Whether the journal may have its end, which its session does not have yet."""

    @property
    def remembered(self) -> int:
        """How many of the kept tokens need not be computed again: all but a prompt's last one,
        whose logits begin the answer."""
        return min(self.kept, self.prompt_tokens - (self.max_tokens > 0))

    @property
    def answer_tokens(self) -> int:
        """How many were generated, the end-of-sequence token excluded."""
        return len(self.session.tokens) - self.prompt_tokens

    @property
    def uncomputed(self) -> int:
        """How many tokens of prompt and answer the session's keys and values lack."""
        return len(self.session.tokens) - self.session.key_values.computed

    @property
    def decoding(self) -> bool:
        """Whether the next step brings the next token of an answer in flight."""
        return self.phase is Phase.COMPUTING and self.answer_tokens > 0 and self.uncomputed == 1

    def choice(self, ahead: Sequence[int]) -> Choice:
        """How the answer's next token is chosen.

        Args:
            ahead: tokens of the answer that are not known yet, as `token_after` names them.
        """
        return Choice(
            self.draws.at(self.answer_tokens + len(ahead)),
            self.processors.at(self.session.tokens, self.prompt_tokens, ahead),
            self.turn.request.sampling.logprobs,
        )

    def next_ids(self, count: int, behind: int = 0) -> list[int]:
        """`count` of the tokens not computed yet, behind so many of them."""
        first = self.session.key_values.computed + behind
        return self.session.tokens[first : first + count]

    def read(self) -> str:
        """Text of the tokens not detokenized yet, up to a stop string; that ends the turn."""
        text, tokens = "", self.session.tokens
        while self.unread and not self.detokenizer.stopped:
            token = tokens[-self.unread]
            text += self.detokenizer.push(token)
            if self.unread_logprobs:
                found = self.unread_logprobs.pop(0)
                self.told_logprobs.append(self.token_texts.told(token, found.logprob, found.top))
            self.unread -= 1
        if self.detokenizer.stopped:
            self.finish_reason = "stop"
            if self.unread:  # computed ahead, they were never said
                del tokens[-self.unread :]
                self.unread = 0
                self.unread_logprobs.clear()
        return text

    def completed(self) -> CompletedTurn:
        """Where its session has it, now that its answer has ended."""
        return CompletedTurn(
            asked=self.prompt_tokens,
            end=len(self.session.tokens),
            images=len(self.session.images),
            pending=self.mark.pending,
            answer=self.detokenizer.text,
            number=self.session.answered,
        )

    def delta(self, text: str, finish_reason: FinishReason = "") -> Delta:
        """The next piece of the answer, with the turn's numbers as they are now."""
        first = self.first_token_at
        logprobs, self.told_logprobs = tuple(self.told_logprobs), []
        return Delta(
            text=text,
            finish_reason=finish_reason,
            num_input_tokens=self.prompt_tokens,
            num_output_tokens=self.answer_tokens,
            num_cached_tokens=self.cached_tokens,
            first_token_ms=0.0 if first is None else (first - self.turn.arrived_at) * 1000.0,
            num_forgotten_turns=self.session.forgotten,
            logprobs=logprobs,
        )
