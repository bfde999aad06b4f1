"""OpenAI chat completions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_sagemaker.adapter.chat_messages import Conversation, Picture, read_conversation
from llava_sagemaker.adapter.chat_parameters import read_parameters
from llava_sagemaker.adapter.errors import AdapterError, invalid_request, unavailable
from llava_sagemaker.adapter.invocation import (
    AnswerFormat,
    Body,
    Invocation,
    Request,
    as_json,
)
from llava_sagemaker.adapter.off_loop import off_loop
from llava_sagemaker.adapter.openai_answers import ChatAnswer
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.remembered import Known, Remembered
from llava_sagemaker.adapter.session_ids import SESSION_NAME, named_session_id
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.history import history_to_json
from llava_triton.contract.operations import Operation

CheckOpen = Callable[[str], Awaitable[None]]
"""Raises SessionError, NOT_FOUND, where there is no session of this ID."""


async def chat_request(
    request: Request,
    fields: dict[str, Any],
    pictures: Pictures,
    remembered: Remembered,
    check_open: CheckOpen,
) -> Invocation:
    """`{"messages": [...], ...}`.

    Without a session: one answer to the whole conversation. In a session, a single user message is
    its next turn; of a whole conversation only what the session does not have is sent. Where the
    messages go on from an earlier turn, the session is rewound to it. Where the session has
    something else, it is opened anew with all of it, but only where it is known that the messages
    show every picture that the session was shown, or where the client named the session itself.

    Args:
        request, fields: the request and its JSON.
        pictures: loads them.
        remembered: what was said in sessions.
        check_open: raises SessionError, NOT_FOUND, where there is no such session.

    Raises:
        AdapterError: invalid_request or image_..., naming the field that cannot be followed.
        SessionError: NOT_FOUND.
    """
    size = len(request.body)
    parameters = read_parameters(fields)
    stream = request.by_streaming_call if parameters.stream is None else parameters.stream
    in_session = request.session is not None or request.session_name is not None
    if parameters.choices > 1 and in_session:
        raise invalid_request(
            "n above 1 came with a session, which goes on with one answer; ask without a session, "
            "or ask the session again for each further answer",
            "n",
        )
    num_frames = _num_frames(fields.get("media_io_kwargs"))
    conversation = await off_loop(size, read_conversation, fields.get("messages"), num_frames)
    past = b""
    if in_session:
        past = await off_loop(size, conversation.past_digest)
    if request.open_session is not None:
        place = await _in_session(request.open_session, conversation, past, remembered, check_open)
    elif request.session is None and request.session_name is not None:
        session_id = named_session_id(request.tenant, request.session_name)
        place = await _in_named_session(session_id, conversation, past, remembered, check_open)
    else:
        flags = request.session_flags()
        place = _Place(flags.pop("session_id"), past, flags)
    images: Sequence[Picture] = conversation.images
    history = None
    if place.opens:
        images = conversation.all_images()
        history = await off_loop(size, history_to_json, conversation.history())
    asked = await off_loop(
        size,
        turn,
        place.session_id,
        start=place.flags.get("start", False),
        end=place.flags.get("end", False) and parameters.choices == 1,
        text=conversation.text,
        images=await pictures.load(images, request.take),
        positions=conversation.positions,
        sampling=parameters.sampling,
        history=history if conversation.past else None,
        parameters=Operation(rewind=place.kept).to_parameters(),
    )
    answer = ChatAnswer(parameters.include_usage, "logprobs" in parameters.sampling)
    if not in_session:  # nothing to remember
        return Invocation("chat", asked, answer, stream, choices=parameters.choices)
    before = place.before
    if place.known is not None and place.known.turns != place.turns:
        if conversation.past:
            raise unavailable("another request used the session meanwhile; try again")
        before = None  # something else was said meanwhile
    return Invocation(
        "chat",
        asked,
        answer,
        stream,
        opened=place.session_id if request.opens else None,
        session_turn=remembered.chat_begins(
            place.session_id, before, conversation, asked.start, place.kept
        ),
    )


def _num_frames(options: Any) -> int | None:
    """Of each video, that are to be shown: vLLM's `{"video": {"num_frames": 8}}`."""
    try:
        number = (options or {}).get("video", {}).get("num_frames")
    except AttributeError:
        number = options
    if number is None or (type(number) is int and 0 < number < 1_000_000):
        return number
    raise invalid_request(
        f"media_io_kwargs is {str(options)[:80]}; it may be "
        '{"video": {"num_frames": a number of at least 1}}',
        "media_io_kwargs",
    )


@dataclass(frozen=True)
class _Ended(AnswerFormat):
    """As OpenAI's API tells that something was deleted."""

    name: str

    def whole(self, answer: Delta) -> Body:
        return as_json({"id": self.name, "object": "session", "deleted": True})


def end_request(request: Request) -> Invocation:
    """Ends the session that its client calls by a name.

    Raises:
        AdapterError: invalid_request, the request names none.
    """
    if request.session_name is None:
        raise invalid_request(f"the request names no session; name it in the header {SESSION_NAME}")
    session_id = named_session_id(request.tenant, request.session_name)
    return Invocation("close", turn(session_id, end=True), _Ended(request.session_name))


@dataclass(frozen=True)
class _Place:
    """The session of a turn, and what it has already."""

    session_id: str
    before: bytes | None
    """The digest of what will have been said before the question; None: that is not known."""
    flags: dict[str, bool] = field(default_factory=dict)
    """Of the turn: empty where it goes on in an open session."""
    known: Known | None = None
    turns: int = 0
    """Of `known`, when it was looked at."""
    kept: int | None = None
    """The turns of the session from which the messages go on; None: from all that it has."""

    @property
    def opens(self) -> bool:
        """Whether the session gets the whole conversation."""
        return bool(self.flags)


async def _in_session(
    session_id: str,
    conversation: Conversation,
    past: bytes,
    remembered: Remembered,
    check_open: CheckOpen,
) -> _Place:
    """In a session whose ID we made."""
    known = remembered.known(session_id)
    before, turns = (known.digest, known.turns) if known else (None, 0)
    if not conversation.past or before == past:
        return _Place(session_id, before, {}, known, turns)
    kept = _turns_before(known, past)
    # Several chats may use one session: none takes a picture back that it has not seen.
    if known and kept is not None and known.said.shown_since(kept) <= conversation.pictures:
        return _Place(session_id, past, {}, known, turns, kept)
    await check_open(session_id)  # nobody but we makes IDs
    if known is None:
        raise invalid_request(
            "it is not known any more what the session was shown, so it cannot be told whether "
            "the messages continue it; send only the new user message, or the whole conversation "
            "in a new session"
        )
    if not known.pictures <= conversation.pictures:
        raise invalid_request(
            "the messages are not what was said in the session, and it has a picture that they do "
            "not show; send only the new user message"
        )
    return _Place(session_id, past, {"start": True}, known, turns)


async def _in_named_session(
    session_id: str,
    conversation: Conversation,
    past: bytes,
    remembered: Remembered,
    check_open: CheckOpen,
) -> _Place:
    """In a session that the client named. Its messages are the whole conversation where there is
    an answer among them."""
    known = remembered.known(session_id)
    before, turns = (known.digest, known.turns) if known else (None, 0)
    if known is not None and known.opening:
        raise unavailable("another request is opening the session; try again later")
    goes_on = not conversation.past or before == past
    kept = None if goes_on else _turns_before(known, past)
    if goes_on or kept is not None:
        try:
            await check_open(session_id)
        except SessionError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            if known is not None and not conversation.past:
                remembered.forget(session_id)  # told once: who asks again begins anew
                raise AdapterError(
                    400,
                    "session_not_found",
                    f"the session of this {SESSION_NAME} has expired or was lost; send the whole "
                    "conversation, or ask again to begin a new one",
                ) from None
        else:
            before = before if kept is None else past
            return _Place(session_id, before, {}, known, turns, kept)
    return _Place(session_id, past, {"start": True}, known, turns)


def _turns_before(known: Known | None, past: bytes) -> int | None:
    """How many turns a session had when the past was all that was said in it: an answer is to be
    regenerated, or a question was edited. None: it never was, or nobody knows."""
    if known is None or known.digest is None:
        return None
    return known.said.turns_before(past)
