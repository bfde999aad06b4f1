"""What a chat completion may ask for besides its messages.

The rule: a field that is not known here is ignored. A known one that would change the answer is
followed, or refused; all that are refused are named at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_sagemaker.adapter.chat_outputs import output_parameters
from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_triton.contract.sampling_parameters import MAX_CHOICES

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
    # OpenAI's, of its other API:
    "truncation",
    # Nobody else's:
    "max_seconds",
)
"""Passed on by their names; the engine checks their values."""
_OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "stop_sequences": "stop",
}
"""What others call one of them: OpenAI today, and Hugging Face's servers. The first that is given
counts, the engine's own name last."""
TAKEN_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "length_penalty": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "echo": (False,),
    "return_full_text": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Taken with these values alone, which mean what is done anyway; null always does."""


@dataclass(frozen=True)
class ChatParameters:
    """How to answer a chat completion."""

    sampling: dict[str, Any]
    stream: bool | None
    """None: the request does not say."""
    include_usage: bool
    choices: int
    """How many answers."""


def read_parameters(fields: dict[str, Any]) -> ChatParameters:
    """Check everything of a request but its messages.

    Raises:
        AdapterError: invalid_request, naming each field that cannot be followed.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if refused := list(_refused(given)):
        raise _not_supported(refused)
    stream = given.get("stream")
    if not isinstance(stream, bool | None):
        raise invalid_request("stream must be true or false", "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise invalid_request(
            'stream_options must be an object like {"include_usage": true}', "stream_options"
        )
    sampling = _sampling(given) | output_parameters(given)
    include_usage = options.get("include_usage") is True
    return ChatParameters(sampling, stream, include_usage, _choices(given.get("n", 1)))


def _choices(n: Any) -> int:
    if isinstance(n, float) and n.is_integer():
        n = int(n)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise invalid_request(f"n must be the number of answers, 1 to {MAX_CHOICES}", "n")
    return n


def _refused(given: dict[str, Any]) -> Iterator[str]:
    for name, only in TAKEN_ONLY.items():
        # 1 is 1.0 here, but not True.
        if name in given and not any(
            given[name] == value and isinstance(given[name], bool) == isinstance(value, bool)
            for value in only
        ):
            yield name


def _not_supported(names: list[str]) -> AdapterError:
    verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return invalid_request(f"{', '.join(names)} {verb} not supported; leave {them} out", names[0])


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The engine's sampling parameters."""
    sampling = {name: given[name] for name in (*_SAMPLING, "max_tokens") if name in given}
    for other, name in reversed(_OTHER_NAMES.items()):
        if other in given:
            sampling[name] = given[other]
    stop = sampling.get("stop")
    if isinstance(stop, str | list):
        # An empty string stops nothing.
        sampling["stop"] = [each for each in ([stop] if isinstance(stop, str) else stop) if each]
    if sampling.get("top_p") == 0 and not isinstance(sampling["top_p"], bool):
        # The smallest set of tokens that there is: the likeliest one.
        del sampling["top_p"]
        sampling["top_k"] = 1
    if given.get("do_sample") is False:
        sampling["temperature"] = 0
    elif given.get("do_sample") is True:
        sampling.setdefault("temperature", 1)
    return sampling
