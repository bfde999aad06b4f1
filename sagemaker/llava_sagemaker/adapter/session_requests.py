"""AWS's standard session requests, and pictures and videos sent as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from llava_sagemaker.adapter.pictures import Pictures, Video, named_pictures
from llava_sagemaker.adapter.session_ids import checked_session_id, new_session_id
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.operations import RESUME, REWIND, STOP_ANSWER, Operation


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
    """`{"requestType": "NEW_SESSION"}`, perhaps with `image` and `video` (each one or a list),
    `text` and sampling parameters, or with `resume`, the ID of a session that the journal has; or
    one of the others in an open session: `CLOSE`; `REGENERATE`, perhaps with sampling parameters;
    `REWIND` with `turns`, the number to keep; `FORK`, perhaps with `turns`; `STOP`.

    Raises:
        AdapterError: invalid_request or image_....
        SessionError: INVALID_ARG.
    """
    kind = fields.pop("requestType")
    if kind == "NEW_SESSION":
        if RESUME in fields:
            request = _resuming(request, fields.pop(RESUME))
        return await _open(request, fields, pictures)
    if kind == "CLOSE_SESSION":  # AWS's articles write both
        kind = "CLOSE"
    if not isinstance(kind, str) or kind not in _IN_SESSION:
        raise invalid_request(
            f"requestType is {str(kind)[:80]!r}; it must be NEW_SESSION, "
            f"{', '.join(list(_IN_SESSION)[:-1])} or {list(_IN_SESSION)[-1]}"
        )
    if request.open_session is None:
        raise invalid_request(f"a {kind} request names its session in the session header")
    return _IN_SESSION[kind](request, request.open_session, fields)


def empty_session(request: Request) -> Invocation:
    """The header alone asks for a session."""
    opening = turn(**request.session_flags())
    return in_session("open", opening, _Created(opening.session_id))


def resumed_session(request: Request) -> Invocation:
    """The header alone asks for a session that is to be brought back."""
    assert request.session is not None
    told = _Created(request.session)
    asked = turn(request.session)
    return Invocation("open", asked, told, opened=request.session, only_resumes=True)


def raw_picture(request: Request) -> Invocation:
    """A body of `Content-Type: image/*` or `video/*`: opens a session on it, or shows it in one.

    Raises:
        AdapterError: invalid_request, there is no session or no picture.
    """
    if request.session is None:
        raise invalid_request(
            'a picture alone needs a session: send it with SessionId="NEW_SESSION", or in one'
        )
    if not request.body:
        raise invalid_request("the body is empty; send the bytes of a picture file")
    images: list[bytes | LongString] = [request.body]
    if request.content_type.startswith("video/"):
        images = [LongString((Video("").mark, request.body))]
    shown = turn(**request.session_flags(), images=images)
    told = _Created(shown.session_id) if shown.start else _Answered(shown.session_id)
    return in_session("image", shown, told)


def _resuming(request: Request, session_id: Any) -> Request:
    if not isinstance(session_id, str):
        raise invalid_request("resume must be the ID of the session that is to be brought back")
    return replace(request, session=checked_session_id(session_id), resumes=True)


async def _open(request: Request, fields: dict[str, Any], pictures: Pictures) -> Invocation:
    text = fields.pop("text", None)
    named = named_pictures(fields)
    if isinstance(text, LongString):
        raise too_long("text", text)
    if text is not None and not isinstance(text, str):
        raise invalid_request("text must be a string")
    images = await pictures.load(named, request.take)
    if request.resumes and not text and not images:
        return resumed_session(request)
    # Whatever else the header says: only we make IDs.
    session_id = request.open_session if request.resumes else None
    session_id = session_id or new_session_id()
    opening = await off_loop(
        len(request.body),
        turn,
        session_id,
        start=not request.resumes,
        text=text,
        images=images,
        sampling=fields,
    )
    if text:
        opened = in_session("open", opening, _Answered(session_id), request.wants_events)
    else:
        opened = in_session("open", opening, _Created(session_id))
    return replace(opened, opened=session_id)


def _close(request: Request, session_id: str, fields: dict[str, Any]) -> Invocation:
    _check_empty("CLOSE", fields)
    return in_session("close", turn(session_id, end=True), _Closed(session_id))


def _regenerate(request: Request, session_id: str, fields: dict[str, Any]) -> Invocation:
    again = Operation(regenerate=True).to_parameters()
    answered = turn(session_id, sampling=fields, parameters=again)
    return in_session("regenerate", answered, _Answered(session_id), request.wants_events)


def _rewind(request: Request, session_id: str, fields: dict[str, Any]) -> Invocation:
    if "turns" not in fields:
        raise invalid_request("a REWIND request says in turns how many turns to keep")
    parameters = _kept_turns(fields)
    _check_empty("REWIND", fields)
    return in_session("rewind", turn(session_id, parameters=parameters), _Answered(session_id))


def _fork(request: Request, session_id: str, fields: dict[str, Any]) -> Invocation:
    parameters = _kept_turns(fields) | Operation(fork=session_id).to_parameters()
    _check_empty("FORK", fields)
    fork = turn(new_session_id(), start=True, parameters=parameters)
    return in_session("fork", fork, _Created(fork.session_id))


def _stop(request: Request, session_id: str, fields: dict[str, Any]) -> Invocation:
    _check_empty("STOP", fields)
    # A sequence of its own: a turn of the session would wait for the answer.
    stop = turn(new_session_id(), start=True, end=True, parameters={STOP_ANSWER: session_id})
    return in_session("stop", stop, _Answered(session_id))


_IN_SESSION: dict[str, Callable[[Request, str, dict[str, Any]], Invocation]] = {
    "REGENERATE": _regenerate,
    "REWIND": _rewind,
    "FORK": _fork,
    "STOP": _stop,
    "CLOSE": _close,
}
"""By what `requestType` says: the requests about a session that is open."""


def _kept_turns(fields: dict[str, Any]) -> dict[str, Any]:
    """Take `turns`, which may be left out."""
    given = {REWIND: fields.pop("turns")} if "turns" in fields else {}
    return Operation.from_parameters(given).to_parameters()


def _check_empty(kind: str, fields: dict[str, Any]) -> None:
    if fields:
        raise invalid_request(f"a {kind} request takes no {next(iter(fields))[:80]!r}")


def _plain(text: str) -> Body:
    return Body(text.encode(), "text/plain; charset=utf-8")
