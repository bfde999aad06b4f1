"""A request on /invocations as the adapter understood it: a turn, and how to answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_sagemaker.adapter.remembered import SessionTurn
from llava_sagemaker.adapter.session_ids import NEW_SESSION, new_session_id
from llava_sagemaker.adapter.turns import TritonTurn
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.protocol import NO_TENANT


@dataclass(frozen=True)
class Request:
    """A POST on /invocations, read as far as all its kinds have in common."""

    session: str | None
    """The session header: None, NEW_SESSION or an ID in the right form."""
    content_type: str
    """Without parameters, in small letters; empty where there is none."""
    content_parameters: dict[str, str]
    wants_events: bool
    """`Accept: text/event-stream`, or the streaming call of SageMaker's."""
    by_streaming_call: bool
    """Through SageMaker's InvokeEndpointWithResponseStream."""
    body: bytes
    take: Callable[[int], None]
    """Takes so many bytes more of what the request may have, see `BodyShare.take`."""
    tenant: str = NO_TENANT
    """Whose request it is."""
    session_name: str | None = None
    """What a client of OpenAI's API calls its session."""
    resumes: bool = False
    """The client asked for a new session, which is to be this one: where SageMaker knows its
    instance no more, only the answer to such a request tells it the new one."""

    @property
    def opens(self) -> bool:
        """Whether the header asks for a new session."""
        return self.session == NEW_SESSION

    @property
    def open_session(self) -> str | None:
        """The ID of the open session that the header names."""
        return None if self.opens else self.session

    def session_flags(self, end: bool = False) -> dict[str, Any]:
        """Session ID and flags of a turn by the header alone: in the session that it names, in a
        new one, or, without a header, in one for this turn only.

        Args:
            end: the turn ends its session.
        """
        if self.session is None:
            return {"session_id": new_session_id(), "start": True, "end": True}
        if not self.opens:
            return {"session_id": self.session, "start": False, "end": end}
        if end:
            raise invalid_request(
                "the request opens a session and ends it; for an answer without a session, leave "
                "the session header out"
            )
        return {"session_id": new_session_id(), "start": True, "end": False}


class Body(NamedTuple):
    """What an HTTP answer contains."""

    content: bytes
    content_type: str


class AnswerFormat(ABC):
    """How an answer is written; by default as events that carry the outputs of the models."""

    @abstractmethod
    def whole(self, answer: Delta) -> Body:
        """A whole answer."""

    def choices(self, answers: Sequence[Delta]) -> Body:
        """Several whole answers to one question; most formats have one."""
        return self.whole(answers[0])

    def piece(self, piece: Delta) -> bytes:
        """Events that tell a piece of a streamed answer."""
        return event(ANSWER.to_values(piece))

    def end(self, final: Delta) -> bytes:
        """Events after the last piece."""
        return b""

    def failure(self, error: AdapterError) -> bytes:
        """Events that end a stream which failed in the middle."""
        return b"data: " + error.body() + b"\n\n"


@dataclass(frozen=True)
class Invocation:
    """What to ask Triton, and how to tell the answer."""

    kind: str
    """For the metrics."""
    turn: TritonTurn
    format: AnswerFormat
    stream: bool = False
    opened: str | None = None
    """The ID of the session that this opens for the caller."""
    closed: str | None = None
    """The ID of the session that this closes for the caller."""
    session_turn: SessionTurn | None = None
    """Is told how it ends."""
    choices: int = 1
    """Answers; of several, the turn opens a session that is open until all have begun."""
    only_resumes: bool = False
    """The turn asks for nothing but that its session is there."""


def in_session(
    kind: str, turn: TritonTurn, answer: AnswerFormat, stream: bool = False
) -> Invocation:
    """An invocation that opens or closes what the turn's flags say. (Both: no session at all.)"""
    return Invocation(
        kind,
        turn,
        answer,
        stream,
        opened=turn.session_id if turn.start and not turn.end else None,
        closed=turn.session_id if turn.end and not turn.start else None,
    )


def as_json(value: Any) -> Body:
    """A JSON body."""
    return Body(json.dumps(value).encode(), "application/json")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"
