"""The requests of AWS's LLaVA sample with sticky sessions: its clients work unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_sagemaker.adapter.errors import invalid_request
from llava_sagemaker.adapter.invocation import (
    AnswerFormat,
    Body,
    Invocation,
    Request,
    as_json,
    in_session,
)
from llava_sagemaker.adapter.json_body import LongString, too_long
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.session_ids import checked_session_id, new_session_id
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.delta import Delta


@dataclass(frozen=True)
class _Fixed(AnswerFormat):
    """An answer that does not depend on the model."""

    value: dict[str, Any]

    def whole(self, answer: Delta) -> Body:
        return as_json(self.value)


class _ResponseText(AnswerFormat):
    def whole(self, answer: Delta) -> Body:
        return as_json({"response_text": answer.text})


async def sample_request(
    request: Request, fields: dict[str, Any], pictures: Pictures
) -> Invocation:
    """`start_session` with `path`, `send_text_prompt` with `prompt_text`, `close_session`; the two
    latter with `session_id`, or the session header.

    Raises:
        AdapterError: invalid_request or image_....
    """
    match fields["type"]:
        case "start_session":
            path = fields.get("path")
            images = await pictures.load([] if path is None else [path], request.take)
            session_id = new_session_id()
            opening = turn(session_id, start=True, images=images)
            return in_session("sample", opening, _Fixed({"session_id": session_id}))
        case "send_text_prompt":
            text = fields.get("prompt_text")
            if isinstance(text, LongString):
                raise too_long("prompt_text", text)
            if not isinstance(text, str) or not text:
                raise invalid_request("prompt_text must be the question, a string")
            return in_session("sample", turn(_session(request, fields), text=text), _ResponseText())
        case "close_session":
            closing = turn(_session(request, fields), end=True)
            return in_session("sample", closing, _Fixed({"success": True}))
        case other:
            raise invalid_request(
                f"type is {str(other)[:80]!r}; it must be start_session, send_text_prompt or "
                "close_session"
            )


def _session(request: Request, fields: dict[str, Any]) -> str:
    named = fields.get("session_id")
    if named is None:
        named = request.open_session
    if not isinstance(named, str):
        raise invalid_request("session_id must be the string that start_session answered")
    if request.open_session not in (None, named):
        raise invalid_request("session_id is another session than the one of the session header")
    return checked_session_id(named)
