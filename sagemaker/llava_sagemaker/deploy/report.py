"""What a person sees while something takes long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


def say(text: str) -> None:
    """One line of progress."""
    typer.echo(text)


@contextmanager
def bar(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; the function given takes the bytes done since its last call, from any thread.

    Without a terminal only the label is printed.
    """
    lock = threading.Lock()
    with typer.progressbar(length=max(total_bytes, 1), label=label) as progress:

        def advance(count: int) -> None:
            with lock:
                progress.update(count)

        yield advance


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
