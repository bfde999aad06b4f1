"""Answers as OpenAI's API writes them."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from llava_sagemaker.adapter.invocation import AnswerFormat, Body, as_json, event
from llava_triton.contract.delta import Delta

MODEL = "llava"
"""What answers call the model, whatever the request called it."""
DONE = b"data: [DONE]\n\n"
"""Ends a stream."""


def finish_reason(answer: Delta) -> str:
    """One of OpenAI's."""
    return "stop" if answer.finish_reason in ("stop", "stopped") else "length"


@dataclass
class ChatAnswer(AnswerFormat):
    """A chat completion, or its chunks."""

    include_usage: bool
    logprobs: bool = False
    """Whether the tokens' log probabilities were asked for."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _began: bool = False

    def whole(self, answer: Delta) -> Body:
        """The completion."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer),
            "finish_reason": finish_reason(answer),
        }
        head = self._head("chat.completion")
        return as_json({**head, "choices": [choice], "usage": usage(answer)})

    def piece(self, piece: Delta) -> bytes:
        """A chunk, where there is something to tell."""
        delta: dict[str, str] = {"content": piece.text} if piece.text else {}
        if not self._began:
            self._began = True
            delta = {"role": "assistant", "content": piece.text}
        return self._chunk(delta, None, piece) if delta or piece.logprobs else b""

    def end(self, final: Delta) -> bytes:
        """The last chunks."""
        last = self._chunk({}, finish_reason(final))  # its text and logprobs were a piece's
        if self.include_usage:
            last += event(
                {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(final)}
            )
        return last + DONE

    def _chunk(
        self, delta: dict[str, str], reason: str | None, piece: Delta | None = None
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None if piece is None else self._logprobs(piece),
            "finish_reason": reason,
        }
        no_usage = {"usage": None} if self.include_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **no_usage})

    def _logprobs(self, piece: Delta) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {"content": [json.loads(token) for token in piece.logprobs], "refusal": None}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": MODEL}


def usage(answer: Delta) -> dict[str, Any]:
    """The tokens of an answer and its prompt."""
    return {
        "prompt_tokens": answer.num_input_tokens,
        "completion_tokens": answer.num_output_tokens,
        "total_tokens": answer.num_input_tokens + answer.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached_tokens},
    }


@dataclass
class TextCompletion(AnswerFormat):
    """A completion of OpenAI's older API, or its chunks."""

    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Delta) -> Body:
        """The completion."""
        completion = self._completion(answer.text, finish_reason(answer))
        return as_json({**completion, "usage": usage(answer)})

    def piece(self, piece: Delta) -> bytes:
        """A chunk, where there is something to tell."""
        return event(self._completion(piece.text, None)) if piece.text else b""

    def end(self, final: Delta) -> bytes:
        """The last chunks."""
        last = self._completion("", finish_reason(final))
        return event({**last, "usage": usage(final)}) + DONE

    def _completion(self, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": MODEL,
            "choices": [choice],
        }
