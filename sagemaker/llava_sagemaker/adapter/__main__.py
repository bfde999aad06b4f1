"""`python -m llava_sagemaker.adapter`: the session adapter, in front of a Triton that may come."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from llava_sagemaker.adapter.app import make_app
from llava_sagemaker.adapter.http_protocol import GuardedProtocol
from llava_sagemaker.adapter_process import api_key
from llava_triton.contract.settings import Settings
from llava_triton.server.large_blocks import give_back_large_blocks
from llava_triton.server.server_error import ServerError

DRAIN_SECONDS = 19
"""After SIGTERM running turns may take so long. (The container has 30 s, and its engines need some
of them.)"""


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM, then until running turns have ended."""
    parser = argparse.ArgumentParser(prog="llava_sagemaker.adapter", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--triton",
        nargs="+",
        default=["127.0.0.1:8001"],
        help="host:port of Triton's gRPC, of each engine's",
    )
    parser.add_argument(
        "--triton-metrics", nargs="+", default=["127.0.0.1:8002"], help="host:port of each"
    )
    parser.add_argument("--repository", type=Path, required=True, help="model repository")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings.of_repository(options.repository)
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {options.repository} has no settings that fit: {error}", file=sys.stderr)
        return 1
    try:
        key = api_key()
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    app = make_app(
        options.triton,
        options.triton_metrics,
        settings,
        image_hosts=_listed("LLAVA_IMAGE_HOSTS"),
        image_buckets=_listed("LLAVA_IMAGE_BUCKETS"),
        cors_origins=_listed("LLAVA_CORS_ORIGINS"),
        api_key=key,
    )
    give_back_large_blocks()
    # A connection takes a file descriptor, and 1,024 is a common limit that may be raised.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        listener = _listen(options.host, options.port)
    except OSError as error:
        print(f"error: port {options.port} cannot be used: {error.strerror}", file=sys.stderr)
        return 1
    # Threads that handle large requests give way to the event loop so soon (else after 5 ms).
    sys.setswitchinterval(0.0005)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=GuardedProtocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    # uvicorn raises the signal that ended it once more when it has ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run([listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.create_server((host, port), backlog=2048)
    listener.set_inheritable(True)
    return listener


def _listed(name: str) -> list[str]:
    """The comma-separated words of an environment variable."""
    return [word.strip() for word in os.environ.get(name, "").split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
