"""`llava-triton serve`: Triton's three ports and, beside them, the one of OpenAI's paths."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_sagemaker.adapter_process import AdapterProcess

from llava_cli.errors import CommandError
from llava_cli.files import checkpoint_of, is_repository, repository_of
from llava_export.cli import make_job, read_settings
from llava_export.repository import export
from llava_triton.contract.settings import Settings
from llava_triton.server.ports import check_ports
from llava_triton.server.restarts import RESTARTS, RESTARTS_SECONDS, Faults
from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import TritonServer

STOP_SECONDS = 2.0
"""So long the adapter may take to end running turns."""
FIRST_PAUSE_SECONDS = 1.0
"""Between the adapter's first death and its next start."""


class KeptAdapter:
    """The session adapter in front of a Triton server, started again when it dies.

    Its sessions are Triton's, so they outlive it. What dies too often ends the server too.
    Before it is started again there is a pause, which doubles: what it died of may pass.

    Args:
        host, port: where it listens.
        server: the Triton behind it.
    """

    name = "OpenAI"

    def __init__(self, host: str, port: int, server: TritonServer) -> None:
        self._host = host
        self._port = port
        self._server = server
        self._faults = Faults()
        self._start_at: float | None = None
        """On time.monotonic's clock, where it has died."""
        self._process = AdapterProcess(
            host,
            port,
            server.grpc_address,
            server.metrics_url.removeprefix("http://").removesuffix("/metrics"),
            server.repository,
        )

    @property
    def url(self) -> str:
        """For OpenAI's clients."""
        host = "127.0.0.1" if self._host == "0.0.0.0" else self._host
        return f"http://{host}:{self._port}/v1"

    def start(self) -> None:
        """Start it; it says 503 until Triton serves.

        Raises:
            PortError: its port is taken, or is one of Triton's.
        """
        same = self._server.ports if self._host == self._server.host else {}
        check_ports(self._host, {**same, "openai": self._port})
        self._process.start()

    def look(self) -> None:
        """Start it again where it has died.

        Raises:
            ServerError: it has died too often.
        """
        status = self._process.exit_status()
        if status is None:
            return
        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self._start_at = None
                self._process.start()
            return
        died = f"the session adapter has died (exit status {status})"
        times = self._faults.one_more()
        if times > RESTARTS:
            minutes = RESTARTS_SECONDS / 60
            raise ServerError(f"{died}, {times} times in {minutes:.0f} minutes; see above why")
        pause = FIRST_PAUSE_SECONDS * 2 ** (times - 1)
        self._start_at = time.monotonic() + pause
        print(f"{died}: starting it again in {pause:.0f} s; Triton's sessions go on", flush=True)

    def stop(self) -> None:
        """End it."""
        self._process.stop(STOP_SECONDS)


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
