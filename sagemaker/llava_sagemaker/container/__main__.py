"""`python -m llava_sagemaker.container`: what SageMaker runs as `docker run IMAGE serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llava_sagemaker.container.encoder import repository_to_serve
from llava_sagemaker.container.errors import ContainerError
from llava_sagemaker.container.shared_memory import warning
from llava_sagemaker.container.stop_signal import Stopped, StopSignal
from llava_sagemaker.container.supervisor import RESTARTS, Supervisor, check_port
from llava_triton.contract.settings import Settings
from llava_triton.server.triton_server import ServerError


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM (exit status 0), or until something dies that cannot be mended (1)."""
    parser = argparse.ArgumentParser(prog="llava_sagemaker.container", description=__doc__)
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=Path("/opt/ml/model"),
        help="exported model repository (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=os.environ.get("SAGEMAKER_BIND_TO_PORT") or "8080",
        help="where /ping and /invocations answer (default: SAGEMAKER_BIND_TO_PORT, else 8080)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=os.environ.get("LLAVA_RESTARTS") or RESTARTS,
        help="how often each engine and the adapter are started again in ten minutes before the "
        "container ends (default: LLAVA_RESTARTS, else %(default)s)",
    )
    options = parser.parse_args(arguments)
    stop = StopSignal()
    supervisor = Supervisor(options.port, stop, options.restarts)
    failure: Exception | None = None
    try:
        check_port(options.port)
        with stop.at_once():
            repository = repository_to_serve(options.model_dir)
            check_settings(repository)
            told = warning(repository)
        if told:
            print(f"warning: {told}", flush=True)
        supervisor.serve(repository)
    except Stopped:
        pass
    except (ContainerError, ServerError, OSError) as error:
        failure = error
    finally:
        supervisor.stop()
    if failure is not None:  # told last: what died has had its last words
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return 1
    print("stopped", flush=True)
    return 0


def check_settings(repository: Path) -> None:
    """Raises ContainerError where settings.json or LLAVA_CHANGED_SETTINGS has none that fit."""
    try:
        Settings.of_repository(repository)
    except (ValueError, TypeError) as error:
        raise ContainerError(f"{repository} has no settings that fit: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
