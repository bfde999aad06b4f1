"""A question as a text, as simple clients of text generation send it.

`{"prompt": ...}` is OpenAI's older API, which AWS's guides use in sessions, and `{"inputs": ...,
"parameters": {...}}` is Hugging Face's, which LangChain's and LiteLLM's SageMaker classes send.
"""

from __future__ import annotations

from typing import Any

from llava_sagemaker.adapter.chat_parameters import read_parameters
from llava_sagemaker.adapter.errors import invalid_request
from llava_sagemaker.adapter.invocation import (
    AnswerFormat,
    Body,
    Invocation,
    Request,
    as_json,
    event,
    in_session,
)
from llava_sagemaker.adapter.json_body import LongString, too_long
from llava_sagemaker.adapter.off_loop import off_loop
from llava_sagemaker.adapter.openai_answers import TextCompletion, finish_reason
from llava_sagemaker.adapter.pictures import Pictures, named_pictures
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.delta import Delta


async def text_request(request: Request, fields: dict[str, Any], pictures: Pictures) -> Invocation:
    """One question: in the session of the header, in a new one, or without. `image` and
    `video` may name pictures and videos, as in a session request.

    Raises:
        AdapterError: invalid_request or image_..., naming the field that cannot be followed.
    """
    name = "prompt" if "prompt" in fields else "inputs"
    text = fields[name]
    if isinstance(text, LongString):
        raise too_long(name, text)
    if not isinstance(text, str) or not text:
        or_tensors = " (or Triton's list of tensors)" if name == "inputs" else ""
        raise invalid_request(f"{name} must be the question, a string{or_tensors}", name)
    more = fields.get("parameters")
    if not isinstance(more, dict | None):
        raise invalid_request("parameters must be an object", "parameters")
    parameters = read_parameters({**fields, **(more or {})})
    if "logprobs" in parameters.sampling:
        raise invalid_request("logprobs is told of messages only; send the text as one", "logprobs")
    if parameters.choices > 1:
        raise invalid_request("n above 1 is for messages only; send the text as one", "n")
    images = await pictures.load(named_pictures(fields), request.take)
    asked = await off_loop(
        len(request.body),
        turn,
        **request.session_flags(),
        text=text,
        images=images,
        sampling=parameters.sampling,
    )
    answer = TextCompletion() if name == "prompt" else _GeneratedText()
    stream = request.wants_events if parameters.stream is None else parameters.stream
    return in_session("text", asked, answer, stream)


class _GeneratedText(AnswerFormat):
    """An answer as Hugging Face's servers write it, or its tokens."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def whole(self, answer: Delta) -> Body:
        return as_json([{"generated_text": answer.text}])

    def piece(self, piece: Delta) -> bytes:
        self._text.append(piece.text)
        return _token(piece.text, None, None) if piece.text else b""

    def end(self, final: Delta) -> bytes:
        reason = "eos_token" if finish_reason(final) == "stop" else "length"
        details = {"finish_reason": reason, "generated_tokens": final.num_output_tokens}
        return _token("", "".join(self._text), details)


def _token(text: str, whole: str | None, details: dict[str, Any] | None) -> bytes:
    token = {"text": text, "special": not text}
    return event({"token": token, "generated_text": whole, "details": details})
