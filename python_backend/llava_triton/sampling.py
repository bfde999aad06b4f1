"""Sampling: what a client may ask for, and the next token from a model's logits."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llava_triton.errors import invalid

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True)
class SamplingParameters:
    """How an answer is generated; the names and meanings are those of vLLM and the OpenAI API."""

    max_tokens: int | None = None
    """Longest answer, in tokens; None: the server's default. The model's context bounds it too."""
    temperature: float = 0.0
    """0: always the likeliest token (greedy)."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0 or -1: all."""
    seed: int | None = None
    """Same seed, same answer; None: random."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token, for measurements."""

    @classmethod
    def from_json(cls, text: str) -> SamplingParameters:
        """Parse the input `sampling_parameters`.

        Raises:
            SessionError: INVALID_ARG: no JSON object, an unknown name, a wrong type or a value
                out of range.
        """
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise invalid(f"sampling_parameters is not valid JSON: {error}") from error
        if not isinstance(given, dict):
            raise invalid(
                f"sampling_parameters is {_shown(given)}; give a JSON object such as "
                '{"max_tokens": 64}'
            )
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise invalid(
                f"sampling_parameters has the unknown name {_shown(unknown[0])}; "
                f"known are {', '.join(known)}"
            )
        values = {name: _CHECKS[name](name, value) for name, value in given.items()}
        return cls(**{name: value for name, value in values.items() if value is not None})


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(name: str, value: object, expected: str) -> Exception:
    return invalid(f"sampling parameter {name} is {_shown(value)}; it must be {expected}")


def _whole(low: int, high: int, none: bool = False) -> Any:
    def check(name: str, value: object) -> int | None:
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def _real(low: float, high: float, open_low: bool = False) -> Any:
    def check(name: str, value: object) -> float:
        bounds = ("above", "and at most") if open_low else ("from", "to")
        expected = f"a number {bounds[0]} {low:g} {bounds[1]} {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refuse(name, value, expected)
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            raise _refuse(name, value, expected)
        return float(value)

    return check


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else ([] if value is None else value)
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in strings)
    ):
        raise _refuse(
            name,
            value,
            f"a string or a list of at most {MAX_STOP_STRINGS} strings, each of 1 to "
            f"{MAX_STOP_CHARACTERS} characters",
        )
    return tuple(strings)


_CHECKS: dict[str, Any] = {
    "max_tokens": _whole(1, 2**31 - 1, none=True),
    "temperature": _real(0.0, 2.0),
    "top_p": _real(0.0, 1.0, open_low=True),
    "top_k": _whole(-1, 2**31 - 1),
    "seed": _whole(0, 2**63 - 1, none=True),
    "stop": _strings,
    "ignore_eos": _flag,
}


class Sampler:
    """Draws one turn's tokens.

    Each turn has a random generator of its own, so that its seed alone decides what is drawn,
    whatever other turns run beside it.

    Args:
        parameters: of the turn.
        device: where the logits are.
    """

    def __init__(self, parameters: SamplingParameters, device: torch.device) -> None:
        self._parameters = parameters
        self._generator: torch.Generator | None = None
        if parameters.temperature > 0.0:
            self._generator = torch.Generator(device)
            if parameters.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(parameters.seed)

    def sample(self, logits: Tensor) -> int:
        """The next token's ID from its logits [V], float32."""
        if self._generator is None:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits, self._parameters)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def filtered_probabilities(logits: Tensor, parameters: SamplingParameters) -> Tensor:
    """Probabilities [V] after temperature, top-k and top-p, in that order; they add up to 1.

    Top-p keeps the smallest set of likeliest tokens whose probabilities reach `top_p`, hence
    always at least one. Equal logits are kept or dropped by their order in a stable sort.
    """
    # A tiny temperature would overflow: shifted first, the largest logit stays 0 at any of them.
    scaled = (logits - logits.max()) / max(parameters.temperature, 1e-6)
    ordered, order = scaled.sort(descending=True, stable=True)
    if 0 < parameters.top_k < len(ordered):
        ordered[parameters.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    if parameters.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= parameters.top_p, 0.0)
        probabilities[0] = probabilities[0].clamp(min=1e-30)
    probabilities = probabilities / probabilities.sum()
    return torch.empty_like(probabilities).scatter_(0, order, probabilities)
