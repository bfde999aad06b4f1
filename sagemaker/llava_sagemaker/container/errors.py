"""What ends the container."""

from __future__ import annotations


class ContainerError(Exception):
    """The container cannot start or go on; the sentence says why and what to do."""
