"""What `llava-triton serve` serves: the repository of a model, exported where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_cli.errors import CommandError
from llava_cli.files import checkpoint_of, is_repository, repository_of
from llava_export.cli import make_job, read_settings
from llava_export.repository import export
from llava_triton.contract.settings import Settings


def settings_from(file: Path | None, **given: Any) -> Settings | None:
    """The settings that a command's options ask for; None where it has none.

    Args:
        file: JSON with settings.
        given: settings that go before those of the file; None: not given.

    Raises:
        ExportError: the file holds no settings.
        CommandError: a value is out of range.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if file is None and not changes:
        return None
    try:
        return replace(read_settings(file), **changes)
    except ValueError as error:
        raise CommandError(str(error)) from error


def exported(model: str, settings: Settings | None) -> Path:
    """The model repository of a model; exports the model where that is missing or outdated.

    Args:
        model: an exported repository, which is taken as it is, or a checkpoint: a directory, a hub
            name, NAME@REVISION or "demo".
        settings: of the export; None for the defaults.

    Raises:
        ExportError: there is no such checkpoint, or it cannot be exported.
        CommandError: an exported repository and settings.
    """
    if is_repository(model):
        if settings is not None:
            raise CommandError(
                f"{model} is an exported model repository and is served with the settings that it "
                "was exported with; leave out --dtype, --weights, --max-sessions and --settings, "
                "and the variables LLAVA_DTYPE, LLAVA_WEIGHTS, LLAVA_MAX_SESSIONS and "
                "LLAVA_SETTINGS, or give them to `llava-triton export`, or name the checkpoint"
            )
        return Path(model)
    repository = repository_of(model)
    export(make_job(checkpoint_of(model), repository, settings or Settings()))
    return repository
