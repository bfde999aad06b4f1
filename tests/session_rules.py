"""The session rules as a plain model, for tests of the engine under random operations."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.operations import NO_OPERATION, Operation
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.contract.structured_outputs import StructuredOutputs
from llava_triton.engine.session import SessionId
from tests.engine_harness import EngineHarness, Pending

MAX_SESSIONS = 3
POOL_BLOCKS = 30
PICTURES_ON_DEVICE, PICTURES_ON_HOST = 2, 3
ROOM_FOR_PICTURES = PICTURES_ON_DEVICE + PICTURES_ON_HOST
IDLE_SECONDS, LIFETIME_SECONDS = 100.0, 450.0

TENANTS: dict[SessionId, str] = {"a": NO_TENANT, 7: NO_TENANT, "7": "bob", "b": "bob"}
"""Whose sessions are opened under an ID, but for a stranger's."""
STRANGER = "eve"
IDS: tuple[SessionId, ...] = tuple(TENANTS)
PICTURES = [Image.new("RGB", (60, 60), (40 * number, 250 - 30 * number, 99)) for number in range(8)]


@dataclass(frozen=True)
class Talk:
    """What one turn says and asks for."""

    text: str | None
    pictures: tuple[int, ...] = ()
    max_tokens: int = 5
    """0: stopped before its first token."""
    stop: tuple[str, ...] = ()
    asked: tuple[tuple[str, Any], ...] = ()
    """More sampling parameters."""

    @property
    def says_nothing(self) -> bool:
        """Neither text nor a picture."""
        return self.text is None and not self.pictures

    @property
    def forgets(self) -> bool:
        """Whether it lets the oldest turns go."""
        return ("truncation", "auto") in self.asked

    @property
    def opening(self) -> Talk:
        """What is left of it, as an opening, where it says nothing."""
        return replace(NOTHING, asked=FORGETS if self.forgets else ())


@dataclass(frozen=True)
class Back:
    """The conversation went back to so many answered questions."""

    kept: int


NOTHING = Talk(None)
FORGETS: tuple[tuple[str, Any], ...] = (("truncation", "auto"),)
Conversation = tuple[Talk | Back, ...]
"""The turns that were completed, in order. Where one of them may have forgotten others, also those
that were taken back: what they made the session forget stays forgotten."""


def talks_of(conversation: Conversation) -> list[Talk]:
    """Those that were not taken back, whether the session has forgotten them or not."""
    left: list[Talk] = []
    for each in conversation:
        if isinstance(each, Talk):
            left.append(each)
        else:
            asked = [index for index, talk in enumerate(left) if talk.text is not None]
            if each.kept < len(asked):
                del left[asked[each.kept] :]
    return left


@dataclass(frozen=True)
class Reply:
    """What a completed turn says, whatever else happens."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_forgotten_turns: int


class Oracle:
    """Answers conversations one by one, in an engine that has nothing else to do.

    Args:
        harness: the engine.
    """

    def __init__(self, harness: EngineHarness) -> None:
        self._harness = harness
        self._known: dict[Conversation, Reply | ErrorCode] = {}

    def reply(self, conversation: Conversation) -> Reply | ErrorCode:
        """To a conversation's last turn; every other turn of it is possible."""
        if conversation not in self._known:
            self._known[conversation] = self._hold(conversation)
        return self._known[conversation]

    def _hold(self, conversation: Conversation) -> Reply | ErrorCode:
        self._harness.restart()
        reply: Reply | ErrorCode = ErrorCode.INTERNAL
        for index, talk in enumerate(conversation):
            try:
                if isinstance(talk, Back):
                    back = Operation(rewind=talk.kept)
                    pending = submit(self._harness, "s", NOTHING, operation=back)
                elif talk.max_tokens:
                    pending = submit(self._harness, "s", talk, start=index == 0)
                else:
                    pending = self._stop_at_once(talk, start=index == 0)
                reply = reply_of(*pending.wait())
            except SessionError as error:
                if index < len(conversation) - 1:
                    raise
                return error.code
        return reply

    def _stop_at_once(self, talk: Talk, start: bool) -> Pending:
        # An answer that a stop string ended may have a step in flight, which would be held.
        while self._harness.inspect(lambda state: state.steps_in_flight):
            pass
        with self._harness.held_device() as device:
            pending = submit(self._harness, "s", replace(talk, max_tokens=1), start=start)
            device.wait_until_busy()
            self._harness.engine.stop_answer("s", NO_TENANT, lambda _: None)
        return pending


def submit(
    harness: EngineHarness,
    session_id: SessionId,
    talk: Talk,
    *,
    start: bool = False,
    end: bool = False,
    tenant: str = NO_TENANT,
    operation: Operation = NO_OPERATION,
    listen: Callable[[object], None] | None = None,
) -> Pending:
    return harness.submit(
        session_id,
        talk.text,
        [PICTURES[number] for number in talk.pictures],
        start=start,
        end=end,
        tenant=tenant,
        operation=operation,
        listen=listen,
        max_tokens=talk.max_tokens,
        stop=talk.stop,
        **dict(talk.asked),
    )


def gone_back(conversation: Conversation, operation: Operation) -> Conversation | None:
    """What an operation leaves of a conversation; None where it is refused."""
    left = talks_of(conversation)
    asked = [index for index, talk in enumerate(left) if talk.text is not None]
    kept = len(asked) if operation.rewind is None else operation.rewind
    if operation.regenerate:
        kept = len(asked) - 1
    if not 0 <= kept <= len(asked):
        return None
    if kept == len(asked):
        return conversation
    if any(isinstance(each, Back) or each.forgets for each in conversation):
        return (*conversation, Back(kept))
    return tuple(left[: asked[kept]]) or (NOTHING,)


def reply_of(text: str, final: Delta) -> Reply:
    numbers = final.num_input_tokens, final.num_output_tokens, final.num_forgotten_turns
    return Reply(text, final.finish_reason, *numbers)


@dataclass
class Open:
    """An open session, by the rules."""

    opened_at: float
    tenant: str
    used_at: float = 0.0
    conversation: Conversation = ()

    @property
    def pictures(self) -> set[tuple[str, int]]:
        """Every picture of the conversation, and whose it is: tenants share none."""
        talks = talks_of(self.conversation)
        return {(self.tenant, each) for talk in talks for each in talk.pictures}


@dataclass
class Flight:
    """A turn that was submitted, not looked at since."""

    session_id: SessionId
    talk: Talk
    start: bool
    end: bool
    tenant: str
    pending: Pending
    operation: Operation = NO_OPERATION
    may_be_cancelled: bool = False
    may_be_stopped: bool = False
    result: Reply | ErrorCode | None = None
    sentence: str = ""
    """Of the error."""

    @property
    def pictures(self) -> set[tuple[str, int]]:
        """Those that it brings, and whose they are."""
        return {(self.tenant, picture) for picture in self.talk.pictures}

    def wait(self) -> None:
        """Take the result, once."""
        if self.result is not None:
            return
        try:
            self.result = reply_of(*self.pending.wait())
            if self.result.finish_reason == "stopped":
                # As if no more tokens had been wanted.
                self.talk = replace(self.talk, max_tokens=self.result.num_output_tokens)
        except SessionError as error:
            self.result, self.sentence = error.code, error.sentence
        except queue.Empty:
            raise AssertionError(f"{self} is never answered") from None


@dataclass(frozen=True)
class Closing:
    """A `close` among the flights."""

    session_id: SessionId


class Limits:
    """What is open, and which pictures are held, while turns of several sessions are in flight.

    Args:
        sessions: open before.
        flights: the turns.
    """

    def __init__(
        self, sessions: Mapping[SessionId, Open], flights: Sequence[Flight | Closing]
    ) -> None:
        turns = [flight for flight in flights if isinstance(flight, Flight)]
        perhaps_closed = {
            flight.session_id
            for flight in flights
            if isinstance(flight, Closing) or flight.start or flight.end
        }
        self.surely_open = set(sessions) - perhaps_closed
        self.perhaps_open = set(sessions) | {turn.session_id for turn in turns if turn.start}
        goes_back = {turn.session_id for turn in turns if turn.operation != NO_OPERATION}
        self.surely_held: set[tuple[str, int]] = set()
        for session_id in self.surely_open - goes_back:
            self.surely_held |= sessions[session_id].pictures
        self.tenants: defaultdict[SessionId, set[str]] = defaultdict(set)
        """Who has a session or a turn under an ID."""
        for session_id, session in sessions.items():
            self.tenants[session_id].add(session.tenant)
        for turn in turns:
            self.tenants[turn.session_id].add(turn.tenant)
        self.perhaps_held = {pair for turn in turns for pair in turn.pictures}
        for session in sessions.values():
            self.perhaps_held |= session.pictures


ASKED: tuple[tuple[tuple[str, Any], ...], ...] = (
    (("repetition_penalty", 1.3), ("frequency_penalty", 0.5), ("min_tokens", 3)),
    (("temperature", 1.0), ("seed", 3), ("logprobs", 2)),
    (("structured_outputs", StructuredOutputs(regex="[a-z ]{1,30}")),),
    FORGETS,
    FORGETS,
)
LONG = "Tell me more of it. " * 12
"""Some of them fill the context."""


def talks(*pictures: tuple[int, ...]) -> st.SearchStrategy[Talk]:
    """Turns with one of these sets of pictures."""
    return st.builds(
        Talk,
        text=st.sampled_from(["What?", "And the circle on the left?", "Why so? " * 5, None, LONG]),
        pictures=st.sampled_from(pictures),
        max_tokens=st.sampled_from([1, 5, 14, 40]),
        stop=st.sampled_from([(), ("e",), ("a", "o "), ()]),
        asked=st.sampled_from([(), (), (), *ASKED]),
    )
