"""How every command ends that cannot do what it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from llava_export.errors import ExportError
from llava_triton.contract.errors import SessionError
from llava_triton.server.server_error import ServerError


class CommandError(Exception):
    """A command cannot be done as it was asked for; one sentence says what to do."""


@contextmanager
def told() -> Iterator[None]:
    """Within, a failure that a person can mend becomes one sentence and exit status 1."""
    try:
        yield
    except SessionError as error:
        raise _ended(error.sentence) from error
    except (CommandError, ExportError, ServerError, OSError) as error:
        raise _ended(str(error)) from error
    except KeyboardInterrupt:
        typer.echo("")
        raise typer.Exit(130) from None


def _ended(sentence: str) -> typer.Exit:
    typer.echo(f"error: {sentence}", err=True)
    return typer.Exit(1)
