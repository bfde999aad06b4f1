"""What a client is told when its request fails: one place from any fault to an HTTP answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import grpc
from starlette.responses import Response

from llava_triton.contract.errors import (
    MODEL,
    MODEL_PROCESS,
    SHARED_MEMORY,
    ErrorCode,
    SessionError,
)
from llava_triton.contract.models import IMAGE, VIDEO

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1


class AdapterError(Exception):
    """A request that was refused or failed.

    Args:
        status: the HTTP status.
        code: for programs: session_not_found, invalid_request, image_..., video_...,
            body_too_large,
            unavailable, internal.
        sentence: for people: what was given, what was expected, what to do.
        param: the field of the request that is to blame, where it is one.
    """

    def __init__(self, status: int, code: str, sentence: str, param: str | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.sentence = sentence
        self.param = param

    def body(self) -> bytes:
        """The answer's JSON, in the manner of OpenAI."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.sentence,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The whole HTTP answer, with these headers."""
        retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 503 else {}
        all_headers = {**retry, **(headers or {})}
        return Response(self.body(), self.status, all_headers, "application/json")


def invalid_request(sentence: str, param: str | None = None) -> AdapterError:
    """The request can never succeed as it is."""
    return AdapterError(400, "invalid_request", sentence, param)


def unavailable(sentence: str) -> AdapterError:
    """The request may succeed later."""
    return AdapterError(503, "unavailable", sentence)


def as_adapter_error(error: Exception, level: int = logging.WARNING) -> AdapterError:
    """What a client is told of a failure; what it cannot act on goes to the log.

    Args:
        error: the failure.
        level: in the log, of what Triton said.
    """
    if isinstance(error, AdapterError):
        return error
    if isinstance(error, SessionError):
        return _of_engine(error, level)
    if isinstance(error, TimeoutError):
        return unavailable("the model did not answer in time; try again later")
    if isinstance(error, grpc.aio.AioRpcError):
        log.log(level, "Triton: %s: %s", error.code(), error.details())
        return unavailable("the model server cannot be reached; it is starting or has failed")
    log.error("a request failed", exc_info=error)
    return AdapterError(500, "internal", "the request failed in the server; it is in its log")


def _of_engine(error: SessionError, level: int) -> AdapterError:
    match error.code:
        case ErrorCode.NOT_FOUND:
            return AdapterError(
                400,
                "session_not_found",
                "the session is unknown, has expired or was lost; open a new one by "
                'SessionId="NEW_SESSION"',
            )
        case ErrorCode.INVALID_ARG if error.subject in (IMAGE.name, VIDEO.name):
            return AdapterError(400, f"{error.subject}_invalid", error.sentence)
        case ErrorCode.INVALID_ARG:
            return invalid_request(error.sentence)
        case ErrorCode.UNAVAILABLE | ErrorCode.CANCELLED:
            return unavailable(error.sentence)
        case ErrorCode.INTERNAL if error.subject == SHARED_MEMORY:
            log.log(level, "Triton: %s", error.sentence)
            return unavailable("too many pictures are under way at this moment; try again later")
        case ErrorCode.INTERNAL if error.subject in (MODEL_PROCESS, MODEL):
            log.log(level, "Triton: %s", error.sentence)
            return unavailable("the model is not ready; it is starting or has failed")
        case ErrorCode.INTERNAL:
            return AdapterError(500, "internal", error.sentence)
