"""OpenAI chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_sagemaker.adapter.chat_messages import Picture, read_conversation
from llava_sagemaker.adapter.chat_parameters import read_parameters
from llava_sagemaker.adapter.errors import invalid_request, unavailable
from llava_sagemaker.adapter.invocation import (
    AnswerFormat,
    Body,
    Invocation,
    Request,
    as_json,
    event,
)
from llava_sagemaker.adapter.off_loop import off_loop
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.remembered import Remembered
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.delta import Delta
from llava_triton.contract.history import history_to_json
from llava_triton.contract.operations import Operation

MODEL = "llava"
"""What answers call the model, whatever the request called it."""


async def chat_request(
    request: Request,
    fields: dict[str, Any],
    pictures: Pictures,
    remembered: Remembered,
    check_open: Callable[[str], Awaitable[None]],
) -> Invocation:
    """`{"messages": [...], ...}`.

    Without a session: one answer to the whole conversation. In a session, a single user message is
    its next turn; of a whole conversation only what the session does not have is sent. Where the
    messages go on from an earlier turn, the session is rewound to it. Where the session has
    something else, it is opened anew with all of it, but only where it is known that
    the messages show every picture that the session was shown.

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
    conversation = await off_loop(size, read_conversation, fields["messages"])
    images: Sequence[Picture] = conversation.images
    history = None
    flags: dict[str, Any] = {}
    before = known = kept = None
    turns = 0
    if request.session is not None:
        past = await off_loop(size, conversation.past_digest)
    session_id = request.open_session
    if session_id is None:
        flags = request.session_flags()
        session_id = flags.pop("session_id")
        before = past if request.opens else None
    else:
        known = remembered.known(session_id)
        before, turns = (known.digest, known.turns) if known else (None, 0)
        if conversation.past and known is not None and before is not None and before != past:
            kept = known.said.turns_before(past)
        if kept is not None:  # the messages go on from an earlier turn: an answer regenerated, or
            before = past  # a question edited
        elif conversation.past and before != past:
            await check_open(session_id)  # nobody but we makes IDs
            if known is None:
                raise invalid_request(
                    "it is not known any more what the session was shown, so it cannot be told "
                    "whether the messages continue it; send only the new user message, or the "
                    "whole conversation in a new session"
                )
            if not known.pictures <= conversation.pictures:
                raise invalid_request(
                    "the messages are not what was said in the session, and it has a picture that "
                    "they do not show; send only the new user message"
                )
            before, flags = past, {"start": True}
    if flags:
        images = conversation.all_images()
        history = await off_loop(size, history_to_json, conversation.history())
    asked = await off_loop(
        size,
        turn,
        session_id,
        **flags,
        text=conversation.text,
        images=await pictures.load(images, request.take),
        sampling=parameters.sampling,
        history=history if conversation.past else None,
        parameters=Operation(rewind=kept).to_parameters(),
    )
    answer = _ChatAnswer(parameters.include_usage)
    if asked.end:  # no session: nothing to remember
        return Invocation("chat", asked, answer, parameters.stream)
    if conversation.past and known is not None and known.turns != turns:
        raise unavailable("another request used the session meanwhile; try again")
    return Invocation(
        "chat",
        asked,
        answer,
        parameters.stream,
        opened=session_id if request.opens else None,
        session_turn=remembered.chat_begins(session_id, before, conversation, asked.start, kept),
    )


@dataclass
class _ChatAnswer(AnswerFormat):
    """A chat completion, or its chunks."""

    include_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _began: bool = False

    def whole(self, answer: Delta) -> Body:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        usage = _usage(answer)
        return as_json({**self._head("chat.completion"), "choices": [choice], "usage": usage})

    def piece(self, piece: Delta) -> bytes:
        delta: dict[str, str] = {"content": piece.text} if piece.text else {}
        if not self._began:
            self._began = True
            delta = {"role": "assistant", "content": piece.text}
        return self._chunk(delta, None) if delta else b""

    def end(self, final: Delta) -> bytes:
        last = self._chunk({}, final.finish_reason)
        if self.include_usage:
            last += event(
                {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(final)}
            )
        return last + b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": MODEL}


def _usage(answer: Delta) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_input_tokens,
        "completion_tokens": answer.num_output_tokens,
        "total_tokens": answer.num_input_tokens + answer.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached_tokens},
    }
