"""What the command reports without a traceback."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot be done as it was asked for.

    The text is one sentence for the user: what was given, what was expected and what to do.
    """
