"""What was said and shown in sessions: enough to see that a whole conversation continues its own.

All of it may be forgotten at any time: after a restart it is, and of more sessions than there can
be the ones unused for longest are. A session that is not known here may have been shown any
picture, so it is never opened anew with a conversation that may lack one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from llava_sagemaker.adapter.chat_messages import NOTHING_SAID, Conversation, answered
from llava_sagemaker.adapter.errors import unavailable
from llava_sagemaker.adapter.turns import LENGTH_BYTES, TritonTurn
from llava_triton.contract.models import HISTORY, IMAGE, TEXT_INPUT, VIDEO
from llava_triton.contract.operations import Operation

_NOT_IN_MESSAGES = b""
"""Stands for the digest of a picture that no chat completion showed."""
MOST_PICTURES = 1024
"""Of a session, that are remembered one by one; of one with more it is not known what it shows."""
MOST_QUESTIONS = 1024
"""The same: of one with more it is not known to which it could go back."""
_REFUSED = ("invalid_request", "image_invalid", "video_invalid")
"""Outcomes that leave a session as it was before the turn."""


@dataclass(frozen=True)
class KnownQuestion:
    """A question of a session."""

    before: bytes | None
    """The digest of what was said before it; None where that is not known."""
    after: Callable[[str], bytes | None]
    """Gives the digest of what was said after an answer."""
    pictures: frozenset[bytes] = frozenset()
    """Digests of those that came with it."""


@dataclass(frozen=True)
class Said:
    """What was said in a session, as far as it is known."""

    digest: bytes | None = None
    """None where it is not known."""
    questions: tuple[KnownQuestion, ...] | None = None
    """Those that were answered; None where it is not known which."""

    def before_question(self, number: int) -> Said:
        """What was said before the question of this number, counted from 0; of one that is not
        asked yet, all."""
        if self.questions is None or number > len(self.questions):
            return Said()
        if number == len(self.questions):
            return self
        return Said(self.questions[number].before, self.questions[:number])

    def turns_before(self, digest: bytes) -> int | None:
        """How many turns to keep so that no more was said than this digest says; None: it is of
        nothing that was all that was said when a question came."""
        befores = [question.before for question in self.questions or ()]
        return befores.index(digest) if digest in befores else None

    def shown_since(self, turns: int) -> frozenset[bytes]:
        """Digests of the pictures that came with later questions than the first so many."""
        later = (self.questions or ())[turns:]
        return frozenset(picture for question in later for picture in question.pictures)

    def and_answered(self, question: KnownQuestion, answer: str) -> Said:
        """The same, a question and its answer."""
        questions = None if self.questions is None else (*self.questions, question)
        if questions is not None and len(questions) > MOST_QUESTIONS:
            questions = None
        return Said(question.after(answer), questions)


@dataclass(eq=False)
class Known:
    """What is known of one session."""

    said: Said = field(default_factory=Said)
    """Not known while a turn runs."""
    pictures: frozenset[bytes] = frozenset()
    """Digests of what it may have been shown, see `Conversation.pictures`."""
    turns: int = 0
    """Begun so far."""
    opening: bool = False
    """A turn is in flight that opens it, perhaps anew."""

    @property
    def digest(self) -> bytes | None:
        """Of what was said; None while a turn runs, or where it is not known."""
        return self.said.digest


@dataclass(eq=False)
class SessionTurn:
    """A turn in flight in a session that is known. It must be told how it ended."""

    _remembered: Remembered
    _session_id: str
    _known: Known
    _opens: bool
    _left: Said
    """What is said when it begins, if it is what it should be."""
    _question: KnownQuestion | None
    _before: tuple[Said, frozenset[bytes]] = field(init=False)
    _number: int = field(init=False)
    _opened: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        known = self._known
        self._before = known.said, known.pictures
        known.turns += 1
        self._number = known.turns
        known.said = Said()
        known.opening = known.opening or self._opens

    def completed(self, answer: str) -> None:
        """The whole answer is there. To be told before the client has it: its next turn may follow
        at once."""
        self._remembered.keep(self._session_id, self._known)
        self._is_open()
        if self._is_last:
            said = self._left
            self._known.said = said.and_answered(self._question, answer) if self._question else said

    def ended(self, outcome: str) -> None:
        """The request is over, complete or not.

        Args:
            outcome: as for `AdapterMetrics.ended`.
        """
        if self._opens:
            self._is_open()
        elif self._is_last and outcome in _REFUSED:
            self._known.said, self._known.pictures = self._before

    def _is_open(self) -> None:
        """A turn that opens its session no longer does; once, because another one may by then."""
        if self._opens and not self._opened:
            self._opened = True
            self._known.opening = False
            if self._remembered.opening.get(self._session_id) is self._known:
                del self._remembered.opening[self._session_id]

    @property
    def _is_last(self) -> bool:
        """Whether no other turn has begun since: else this one's end tells little."""
        return self._known.turns == self._number


class Remembered:
    """Digests of conversations and pictures by session ID, of the sessions used last.

    Args:
        limit: sessions to remember.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: OrderedDict[str, Known] = OrderedDict()
        self.opening: dict[str, Known] = {}
        """Sessions whose opening is in flight: one that is refused pushes nobody out."""

    def known(self, session_id: str) -> Known | None:
        """What is known of a session; None: nothing, it may have been shown anything."""
        return self._known.get(session_id) or self.opening.get(session_id)

    def other_turn_begins(self, turn: TritonTurn) -> SessionTurn | None:
        """A session gets a turn that is no chat completion.

        Returns:
            What to tell its end; None where nothing is to be remembered.

        Raises:
            AdapterError: unavailable, see `chat_begins`.
        """
        if turn.end:
            self._known.pop(turn.session_id, None)
            return None
        operation = Operation.from_parameters(turn.parameters)
        shows = IMAGE.name in turn.tensors or VIDEO.name in turn.tensors
        text = turn.tensors.get(TEXT_INPUT.name)
        asks = text is not None and text.size > LENGTH_BYTES  # an empty text is none
        pictures = frozenset({_NOT_IN_MESSAGES} if shows else ())
        left, question = Said(), None
        if turn.start and operation.fork is None:
            left = Said() if HISTORY.name in turn.tensors else Said(NOTHING_SAID, ())
        else:
            known = self.known(turn.session_id if operation.fork is None else str(operation.fork))
            if known is None:
                return None
            left = known.said
            if operation.fork is not None:
                pictures |= known.pictures
        if operation.rewind is not None:
            left = left.before_question(operation.rewind)
        elif operation.regenerate and left.questions:
            question = left.questions[-1]
            left = left.before_question(len(left.questions) - 1)
        elif operation.regenerate:
            left = Said()
        if asks:
            question = KnownQuestion(left.digest, _unknown, pictures)
        elif shows and not turn.start:  # messages that continue it would show the picture
            left = Said()
        return self._begins(turn.session_id, turn.start, pictures, left, question)

    def chat_begins(
        self,
        session_id: str,
        before: bytes | None,
        asked: Conversation,
        opens: bool,
        kept: int | None = None,
    ) -> SessionTurn | None:
        """A session is asked by a chat completion.

        Args:
            session_id: whose.
            before: the digest of what was said in it before; None where that is not known.
            asked: the messages.
            opens: whether it opens with them, perhaps anew.
            kept: how many turns it goes back to first; None: it does not.

        Returns:
            What to tell the turn's end; None where nothing is to be remembered.

        Raises:
            AdapterError: unavailable, the session is being opened anew at this moment: what it was
                given now would be lost.
        """
        digest = None if before is None else asked.asked_digest(before)  # and not the pictures
        known = self.known(session_id)
        if opens:
            left = Said(before, None if asked.past else ())
        else:
            left = known.said if known is not None else Said()
            left = Said(before, (left if kept is None else left.before_question(kept)).questions)
        question = KnownQuestion(
            before,
            lambda answer: None if digest is None else answered(digest, answer),
            frozenset(asked.question_digests),
        )
        return self._begins(session_id, opens, asked.pictures, left, question)

    def keep(self, session_id: str, known: Known) -> None:
        """Remember a session from now on, as the one used last."""
        if self.opening.get(session_id) is known:
            self._known[session_id] = self.opening.pop(session_id)
        if session_id in self._known:  # else it was closed meanwhile
            self._known.move_to_end(session_id)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)

    def forget(self, session_id: str) -> None:
        """A session is no more."""
        self._known.pop(session_id, None)

    def _begins(
        self,
        session_id: str,
        opens: bool,
        pictures: frozenset[bytes],
        left: Said,
        question: KnownQuestion | None,
    ) -> SessionTurn | None:
        known = self._known.get(session_id) or self.opening.get(session_id)
        # A second opening would close the first one's session, with its picture.
        if known is not None and known.opening and (opens or session_id in self._known):
            raise unavailable("another request is opening the session; try again later")
        if known is None:
            if not opens:
                return None  # forgotten, or an ID that somebody made up
            known = self.opening[session_id] = Known()
        begun = SessionTurn(self, session_id, known, opens, left, question)
        known.pictures |= pictures
        if len(known.pictures) > MOST_PICTURES:
            known.pictures = frozenset({_NOT_IN_MESSAGES})
        return begun


def _unknown(answer: str) -> None:
    """The digest of what was said behind a question that no chat completion asked."""
