"""AWS's standard session requests, and pictures sent as they are."""

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
from llava_sagemaker.adapter.off_loop import off_loop
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.session_ids import new_session_id
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta


@dataclass(frozen=True)
class _Created(AnswerFormat):
    """What AWS's servers say of a new session."""

    session_id: str

    def whole(self, answer: Delta) -> Body:
        return _plain(f"Session {self.session_id} created")


@dataclass(frozen=True)
class _Closed(AnswerFormat):
    """What AWS's servers say of a closed session."""

    session_id: str

    def whole(self, answer: Delta) -> Body:
        return _plain(f"Session {self.session_id} closed")


@dataclass(frozen=True)
class _Answered(AnswerFormat):
    """The outputs of the models, with the session they belong to."""

    session_id: str

    def whole(self, answer: Delta) -> Body:
        return as_json({"session_id": self.session_id, **ANSWER.to_values(answer)})


async def session_request(
    request: Request, fields: dict[str, Any], pictures: Pictures
) -> Invocation:
    """`{"requestType": "NEW_SESSION"}`, perhaps with `image` (one or a list), `text` and sampling
    parameters; or `{"requestType": "CLOSE"}`.

    Raises:
        AdapterError: invalid_request or image_....
    """
    match fields.pop("requestType"):
        case "NEW_SESSION":
            return await _open(request, fields, pictures)
        case "CLOSE" | "CLOSE_SESSION":  # AWS's articles write both
            return _close(request, fields)
        case other:
            raise invalid_request(
                f"requestType is {str(other)[:80]!r}; it must be NEW_SESSION or CLOSE"
            )


def empty_session(request: Request) -> Invocation:
    """The header alone asks for a session."""
    opening = turn(**request.session_flags())
    return in_session("open", opening, _Created(opening.session_id))


def raw_picture(request: Request) -> Invocation:
    """A body of `Content-Type: image/*`: opens a session on it, or shows it in one.

    Raises:
        AdapterError: invalid_request, there is no session or no picture.
    """
    if request.session is None:
        raise invalid_request(
            'a picture alone needs a session: send it with SessionId="NEW_SESSION", or in one'
        )
    if not request.body:
        raise invalid_request("the body is empty; send the bytes of a picture file")
    shown = turn(**request.session_flags(), images=[request.body])
    told = _Created(shown.session_id) if shown.start else _Answered(shown.session_id)
    return in_session("image", shown, told)


async def _open(request: Request, fields: dict[str, Any], pictures: Pictures) -> Invocation:
    text = fields.pop("text", None)
    image = fields.pop("image", [])
    if isinstance(text, LongString):
        raise too_long("text", text)
    if text is not None and not isinstance(text, str):
        raise invalid_request("text must be a string")
    images = await pictures.load(image if isinstance(image, list) else [image], request.take)
    session_id = new_session_id()  # whatever the header says: only we make IDs
    opening = await off_loop(
        len(request.body),
        turn,
        session_id,
        start=True,
        text=text,
        images=images,
        sampling=fields,
    )
    if text:
        return in_session("open", opening, _Answered(session_id), request.wants_events)
    return in_session("open", opening, _Created(session_id))


def _close(request: Request, fields: dict[str, Any]) -> Invocation:
    if fields:
        raise invalid_request(f"a CLOSE request takes no {next(iter(fields))[:80]!r}")
    session_id = request.open_session
    if session_id is None:
        raise invalid_request("a CLOSE request names its session in the session header")
    return in_session("close", turn(session_id, end=True), _Closed(session_id))


def _plain(text: str) -> Body:
    return Body(text.encode(), "text/plain; charset=utf-8")
