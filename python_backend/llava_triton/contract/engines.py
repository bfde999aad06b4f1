"""How many engines share a machine: said once, by an environment variable."""

from __future__ import annotations

import os

ENGINES = "LLAVA_ENGINES"
"""The variable. An operator may set it; the processes of each engine have it where there are
several, and take no more than their part of the host's memory."""


def engines_here() -> int | None:
    """What the variable says; None where it says nothing.

    Raises:
        ValueError: it is no number of engines.
    """
    text = os.environ.get(ENGINES, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{ENGINES} is {text[:80]!r}; it must be the number of engines, 1 or more")
    return int(text)
