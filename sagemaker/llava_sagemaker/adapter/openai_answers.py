"""Answers as OpenAI's API writes them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_sagemaker.adapter.choices import ChoicePiece
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
    _began: set[int] = field(default_factory=set)
    """The choices of which a piece was told."""
    _ended: list[Delta] = field(default_factory=list)
    """Their last pieces."""

    def whole(self, answer: Delta) -> Body:
        """The completion."""
        return self.choices([answer])

    def choices(self, answers: Sequence[Delta]) -> Body:
        """The completion with all its choices."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer),
                "finish_reason": finish_reason(answer),
            }
            for index, answer in enumerate(answers)
        ]
        head = self._head("chat.completion")
        return as_json({**head, "choices": choices, "usage": usage(answers)})

    def piece(self, piece: Delta) -> bytes:
        """A chunk, where there is something to tell; behind a choice's last piece, one more."""
        index = _index(piece)
        delta: dict[str, str] = {"content": piece.text} if piece.text else {}
        if index not in self._began:
            self._began.add(index)
            delta = {"role": "assistant", "content": piece.text}
        told = self._chunk(piece, delta, None) if delta or piece.logprobs else b""
        if piece.finish_reason:
            self._ended.append(piece)
            told += self._chunk(piece, {}, finish_reason(piece))
        return told

    def end(self, final: Delta) -> bytes:
        """What comes behind all choices."""
        if not self.include_usage:
            return DONE
        head = self._head("chat.completion.chunk")
        told = usage(sorted(self._ended, key=_index))
        return event({**head, "choices": [], "usage": told}) + DONE

    def _chunk(self, piece: Delta, delta: dict[str, str], reason: str | None) -> bytes:
        choice = {
            "index": _index(piece),
            "delta": delta,
            "logprobs": self._logprobs(piece) if reason is None else None,
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


def _index(piece: Delta) -> int:
    return piece.index if isinstance(piece, ChoicePiece) else 0


def usage(answers: Sequence[Delta]) -> dict[str, Any]:
    """The tokens of answers and of their one prompt, which the first of them computed."""
    first = answers[0]
    said = sum(answer.num_output_tokens for answer in answers)
    return {
        "prompt_tokens": first.num_input_tokens,
        "completion_tokens": said,
        "total_tokens": first.num_input_tokens + said,
        "prompt_tokens_details": {"cached_tokens": first.num_cached_tokens},
        "num_forgotten_turns": first.num_forgotten_turns,
    }


@dataclass
class TextCompletion(AnswerFormat):
    """A completion of OpenAI's older API, or its chunks."""

    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Delta) -> Body:
        """The completion."""
        completion = self._completion(answer.text, finish_reason(answer))
        return as_json({**completion, "usage": usage([answer])})

    def piece(self, piece: Delta) -> bytes:
        """A chunk, where there is something to tell."""
        return event(self._completion(piece.text, None)) if piece.text else b""

    def end(self, final: Delta) -> bytes:
        """The last chunks."""
        last = self._completion("", finish_reason(final))
        return event({**last, "usage": usage([final])}) + DONE

    def _completion(self, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": MODEL,
            "choices": [choice],
        }
