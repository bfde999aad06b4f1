"""What a chat completion may ask for besides its messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_sagemaker.adapter.chat_outputs import OUTPUT_FIELDS, output_parameters
from llava_sagemaker.adapter.errors import invalid_request

_SAMPLING = (
    "temperature",
    "top_p",
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    # Not OpenAI's, but vLLM's:
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "structured_outputs",
    "ignore_eos",
    # Nobody else's:
    "max_seconds",
)
"""Passed on by their names; the engine checks their values."""
_HARMLESS = (
    "messages",
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
"""Taken and ignored: they change no answer."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
"""Taken with these values alone, which mean what is done anyway."""


@dataclass(frozen=True)
class ChatParameters:
    """How to answer a chat completion."""

    sampling: dict[str, Any]
    stream: bool
    include_usage: bool


def read_parameters(fields: dict[str, Any]) -> ChatParameters:
    """Check everything of a request but its messages.

    Raises:
        AdapterError: invalid_request, naming the first field that cannot be followed.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    sampling: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SAMPLING:
            sampling[name] = value
        elif name in ("max_tokens", "max_completion_tokens"):
            sampling["max_tokens"] = value
        elif name in _ONLY:
            # 1 is 1.0 here, but not True.
            if not any(
                value == only and isinstance(value, bool) == isinstance(only, bool)
                for only in _ONLY[name]
            ):
                raise invalid_request(f"{name} is not supported; leave it out")
        elif name not in (*_HARMLESS, *OUTPUT_FIELDS, "stream", "stream_options"):
            raise invalid_request(f"{name[:80]!r} is unknown or not supported; leave it out")
    sampling |= output_parameters(given)
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise invalid_request("stream must be true or false")
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise invalid_request('stream_options must be an object like {"include_usage": true}')
    return ChatParameters(sampling, stream, options.get("include_usage") is True)
