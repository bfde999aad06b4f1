"""A chat over OpenAI's chat completions: every turn sends all that was said once more."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from http.client import HTTPException
from typing import Any

from llava_cli.conversation import Chat, ChatTurn, Cost
from llava_triton.client import ErrorCode, SessionError

WAIT_SECONDS = 300.0
"""Nothing comes for so long: nobody answers."""
NOT_AS_AGREED = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an address, or an event of another form than OpenAI's, raises."""


class OpenAIChat(Chat):
    """Args:
    url: up to and with `/v1`. An API key is taken from the variable OPENAI_API_KEY.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = f"{url.rstrip('/')}/chat/completions"

    def close(self) -> None:
        """Nothing to do: the server keeps nothing that has to be ended."""

    def _forget(self) -> None:
        """Nothing to do, likewise."""

    def _pieces(self, turn: ChatTurn, sampling: dict[str, Any]) -> Generator[str, None, None]:
        messages = [message for past in self.turns for message in _messages(past)]
        body = {
            "model": "llava",
            "messages": [*messages, _question(turn)],
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        began = time.perf_counter()
        first: float | None = None
        complete = False
        try:
            with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:"):
                        continue
                    if data == b"[DONE]":
                        complete = True
                        break
                    event = json.loads(data)
                    if "error" in event:
                        raise SessionError(ErrorCode.INTERNAL, _sentence(data))
                    if usage := event.get("usage"):
                        turn.cost = _cost(usage, first or 0.0)
                    for choice in event.get("choices", ()):
                        if piece := choice["delta"].get("content"):
                            first = first or time.perf_counter() - began
                            yield piece
                        complete = complete or choice.get("finish_reason") is not None
        except urllib.error.HTTPError as error:
            code = ErrorCode.UNAVAILABLE if error.code >= 500 else ErrorCode.INVALID_ARG
            raise SessionError(code, _refusal(error)) from error
        except (*NOT_AS_AGREED, OSError, HTTPException) as error:
            raise SessionError(
                ErrorCode.UNAVAILABLE, f"no chat completions at {self._url} ({error!r})"
            ) from error
        if not complete:
            raise SessionError(
                ErrorCode.UNAVAILABLE,
                f"the answer from {self._url} has broken off: it ended without a finish_reason or "
                "[DONE]; ask again",
            )


def _messages(turn: ChatTurn) -> list[dict[str, Any]]:
    return [_question(turn), {"role": "assistant", "content": turn.answer}]


def _question(turn: ChatTurn) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in turn.pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": turn.text}]}


def _data_url(picture: bytes) -> str:
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _cost(usage: dict[str, Any], first_token_seconds: float) -> Cost:
    details = usage.get("prompt_tokens_details") or {}
    return Cost(
        first_token_seconds,
        usage["prompt_tokens"],
        details.get("cached_tokens") or 0,
        usage["completion_tokens"],
    )


def _refusal(error: urllib.error.HTTPError) -> str:
    """What it says, if its body comes."""
    try:
        return _sentence(error.read())
    except (OSError, HTTPException):
        return f"the server answers with status {error.code}, and breaks off"


def _sentence(body: bytes) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except NOT_AS_AGREED:
        return f"the server answers {body[:200]!r}"
