"""What the clients' scripts check with: their environment has no pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Error = TypeVar("Error", bound=BaseException)


def error_of(kind: type[Error], call: Callable[[], object]) -> Error:
    """The error of a call that must fail so."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"there was no {kind.__name__}")
