"""What form an answer must have: the check of the sampling parameter `structured_outputs`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_SCHEMA_CHARACTERS = 32 * 1024
MAX_REGEX_CHARACTERS = 4 * 1024
MAX_CHOICES = 1000
MAX_CHOICES_CHARACTERS = 32 * 1024
"""Of all of them together."""
EXPECTED = (
    'an object with one of: "json", a JSON schema of at most 32 KiB; "regex", a string of 1 to '
    '4,096 characters; "choice", a list of 1 to 1,000 strings, none empty, of 32,768 characters '
    'in all; "json_object", true'
)


@dataclass(frozen=True)
class StructuredOutputs:
    """What an answer must be: one of these is given. Names and meanings are vLLM's."""

    json: str | None = None
    """A JSON schema, as JSON; the answer is JSON that it allows."""
    regex: str | None = None
    """A regular expression that matches the whole answer."""
    choice: tuple[str, ...] = ()
    """One of these."""


def structured_outputs(value: Any) -> StructuredOutputs | None:
    """Read what a client sent; None where it is not `EXPECTED`."""
    if not isinstance(value, dict):
        return None
    given = {name: each for name, each in value.items() if each is not None}
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1:
        return None
    ((name, each),) = given.items()
    if name == "json_object" and each is True:
        return StructuredOutputs(json='{"type": "object"}')
    if name == "json":
        schema = _schema(each)
        return None if schema is None else StructuredOutputs(json=schema)
    if name == "regex" and _is_text(each) and len(each) <= MAX_REGEX_CHARACTERS:
        return StructuredOutputs(regex=each)
    if name == "choice" and _are_choices(each):
        return StructuredOutputs(choice=tuple(each))
    return None


def _is_text(value: Any) -> bool:
    """Whether it is a string that is not empty and has no half of a surrogate pair."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _schema(value: Any) -> str | None:
    """An object, which may be written as JSON text, as JSON."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return None
    return text if isinstance(value, dict) and len(text) <= MAX_SCHEMA_CHARACTERS else None


def _are_choices(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_CHOICES
        and all(isinstance(each, str) and each for each in value)
        and sum(map(len, value)) <= MAX_CHOICES_CHARACTERS
    )
