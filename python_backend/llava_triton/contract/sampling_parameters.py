"""What a client may say about how its answer is sampled: names, types, ranges, and their check."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, get_args

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import SAMPLING_PARAMETERS
from llava_triton.contract.structured_outputs import (
    EXPECTED,
    StructuredOutputs,
    structured_outputs,
)

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 128
MAX_STOP_TOKEN_IDS = 128
MAX_PENALTY = 2.0
"""Of frequency and presence; the least is as far below 0."""
REPETITION_PENALTIES = (0.01, 100.0)
"""The least and the largest. A penalty near 0 would make logits overflow."""
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0
"""A larger one counts as this one, as in vLLM; the least is as far below 0."""
MAX_LOGPROBS = 20
MAX_TOKEN_ID = 2**31 - 1
MAX_CHOICES = 8
"""Answers to one chat completion (`n`): each has a session of its own while it is given."""
Truncation = Literal["auto", "disabled"]


@dataclass(frozen=True)
class SamplingParameters:
    """How one turn's answer is sampled. Names and meanings are vLLM's; the default is greedy."""

    max_tokens: int | None = None
    """Most tokens an answer may have, at least 1; None: the server's default."""
    temperature: float = 0.0
    """0 to 2; 0 takes the likeliest token each time (greedy)."""
    top_p: float = 1.0
    """Above 0, at most 1: sample from the fewest likeliest tokens with at least this probability
    together."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 or -1: from all."""
    seed: int | None = None
    """0 to 2**63 - 1; the same seed gives the same answer. None: another one each time."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these strings that it would contain."""
    max_seconds: float | None = None
    """The answer ends, with what there is of it, when this much time has passed since its turn
    arrived; a turn that has no token by then is refused. None: no limit."""
    ignore_eos: bool = False
    """Go on to `max_tokens` although the model has ended its answer; for measurements."""
    frequency_penalty: float = 0.0
    """-2 to 2; is taken from a token's logit as often as the answer has the token already."""
    presence_penalty: float = 0.0
    """-2 to 2; is taken once from the logits of the tokens that the answer has already."""
    repetition_penalty: float = 1.0
    """0.01 to 100; what the logit of a token is divided by (where it is below 0: multiplied with)
    that the conversation or the answer has already."""
    min_p: float = 0.0
    """0 to 1: sample from the tokens that have at least this part of the likeliest one's
    probability, before top-k and top-p."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token IDs and what is added to their logits, -100 to 100; in JSON an object."""
    min_tokens: int = 0
    """Least tokens of an answer: before, no end token and no `stop_token_ids` can come, and no
    `stop` string counts."""
    stop_token_ids: tuple[int, ...] = ()
    """An answer ends with the first of these tokens. It is part of the answer unless it is a
    special token."""
    logprobs: int | None = None
    """0 to 20: tell the log probability of each token, and those of so many likeliest ones, as the
    model gave them. None: tell none."""
    structured_outputs: StructuredOutputs | None = None
    """What the answer must be; goes with neither `min_tokens` nor `ignore_eos`, and `max_tokens`
    may cut it."""
    truncation: Truncation | None = None
    """What becomes of a conversation that the context has no room for, by the names of OpenAI's
    Responses API: "disabled" refuses the turn, "auto" forgets the oldest turns, see
    `llava_triton.conversation.forgetting`. None: what the turn said that opened the session; of
    that one, "disabled"."""

    @classmethod
    def from_json(cls, text: str) -> SamplingParameters:
        """Read the JSON object of the input `sampling_parameters`; null is as good as left out.

        Raises:
            SessionError: INVALID_ARG, it is no JSON object, or a name, type or value is wrong.
        """
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise _invalid(
                f"sampling_parameters is not valid JSON ({error}); give an object like "
                '{"max_tokens": 64}'
            ) from None
        if not isinstance(values, dict):
            raise _invalid(
                f"sampling_parameters is {_shown(values)}; give a JSON object like "
                '{"max_tokens": 64}'
            )
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise _invalid(
                f"sampling_parameters has the unknown name {_shown(unknown[0])}; known are "
                f"{', '.join(known)}"
            )
        checked: dict[str, Any] = {
            name: _CHECKS[name](name, value) for name, value in values.items() if value is not None
        }
        parameters = cls(**checked)
        if parameters.max_tokens is not None and parameters.min_tokens > parameters.max_tokens:
            _refuse("min_tokens", parameters.min_tokens, "at most max_tokens")
        if parameters.structured_outputs and (parameters.min_tokens or parameters.ignore_eos):
            raise _invalid(
                "sampling parameter structured_outputs goes with neither min_tokens nor "
                "ignore_eos; leave those out"
            )
        return parameters


def _max_tokens(name: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        _refuse(name, value, "a whole number of at least 1")
    # A number no answer can reach; anything larger would only overflow further on.
    return int(min(value, 2**31 - 1))


def _temperature(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= MAX_TEMPERATURE:
        _refuse(name, value, f"a number from 0 to {MAX_TEMPERATURE:g}")
    return float(value)


def _top_p(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value <= 1:
        _refuse(name, value, "a number above 0 and at most 1")
    return float(value)


def _top_k(name: str, value: Any) -> int:
    if not _is_int(value) or value < -1:
        _refuse(name, value, "a whole number of at least 1, or 0 or -1 for all tokens")
    return int(min(max(value, 0), 2**31 - 1))


def _seed(name: str, value: Any) -> int:
    if not _is_int(value) or not 0 <= value <= MAX_SEED:
        _refuse(name, value, f"a whole number from 0 to {MAX_SEED}")
    return int(value)


def _stop(name: str, value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    expected = (
        f"a string or a list of at most {MAX_STOP_STRINGS} strings of 1 to "
        f"{MAX_STOP_CHARACTERS} characters"
    )
    if not isinstance(strings, list) or len(strings) > MAX_STOP_STRINGS:
        _refuse(name, value, expected)
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            _refuse(name, value, expected)
    return tuple(strings)


def _max_seconds(name: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        _refuse(name, value, "a number of seconds above 0")
    return float(min(value, 2**31 - 1))


def _ignore_eos(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return bool(value)


def _number(least: float, largest: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not least <= value <= largest:
            _refuse(name, value, f"a number from {least:g} to {largest:g}")
        return float(value)

    return check


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    expected = (
        f"an object of at most {MAX_BIASED_TOKENS} token IDs and numbers from {-MAX_BIAS:g} to "
        f'{MAX_BIAS:g}, like {{"15": -100}}'
    )
    if not isinstance(value, dict) or len(value) > MAX_BIASED_TOKENS:
        _refuse(name, value, expected)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # JSON's names are strings. (isdecimal knows other digits than ASCII's, too.)
        is_id = len(key) <= 10 and key.isascii() and key.isdecimal() and int(key) <= MAX_TOKEN_ID
        if not is_id or not _is_number(bias):
            _refuse(name, {key: bias}, expected)
        biases[int(key)] = float(max(-MAX_BIAS, min(bias, MAX_BIAS)))
    return tuple(biases.items())


def _min_tokens(name: str, value: Any) -> int:
    if not _is_int(value) or value < 0:
        _refuse(name, value, "a whole number of at least 0")
    return int(min(value, 2**31 - 1))


def _logprobs(name: str, value: Any) -> int:
    if not _is_int(value) or not 0 <= value <= MAX_LOGPROBS:
        _refuse(name, value, f"a whole number from 0 to {MAX_LOGPROBS}")
    return int(value)


def _structured_outputs(name: str, value: Any) -> StructuredOutputs:
    form = structured_outputs(value)
    if form is None:
        _refuse(name, value, EXPECTED)
    return form


def _truncation(name: str, value: Any) -> str:
    known = get_args(Truncation)
    if value not in known:
        _refuse(name, value, " or ".join(f'"{each}"' for each in known))
    return str(value)


def _stop_token_ids(name: str, value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_STOP_TOKEN_IDS
        or not all(_is_int(each) and 0 <= each <= MAX_TOKEN_ID for each in value)
    ):
        _refuse(name, value, f"a list of at most {MAX_STOP_TOKEN_IDS} token IDs")
    return tuple(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _max_tokens,
    "temperature": _temperature,
    "top_p": _top_p,
    "top_k": _top_k,
    "seed": _seed,
    "stop": _stop,
    "max_seconds": _max_seconds,
    "ignore_eos": _ignore_eos,
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": _number(*REPETITION_PENALTIES),
    "min_p": _number(0.0, 1.0),
    "logit_bias": _logit_bias,
    "min_tokens": _min_tokens,
    "stop_token_ids": _stop_token_ids,
    "logprobs": _logprobs,
    "structured_outputs": _structured_outputs,
    "truncation": _truncation,
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise _invalid(f"sampling parameter {name} is {_shown(value)}; it must be {expected}")


def _invalid(sentence: str) -> SessionError:
    return invalid(sentence, SAMPLING_PARAMETERS.name)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _shown(value: Any) -> str:
    """A value as the client wrote it, cut to a length fit for a sentence."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # an integer of thousands of digits
        return "a very long number"
    # JSON can name halves of surrogate pairs, which UTF-8, and so an error's text, cannot hold.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
