"""What the tests share: one exported demo repository and one real server for the whole run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http

from llava_triton.server import TritonServer, free_ports
from tests.triton import Asker, Stream, ask, whole

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, exported by the real command to a path with spaces."""
    repository = tmp_path_factory.mktemp("exported by tests") / "demo repository"
    checkpoint = ROOT / "demo" / "checkpoint"
    done = subprocess.run(
        [sys.executable, "-m", "llava_export", "--model", checkpoint, "--output", repository],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the export failed:\n{done.stdout}{done.stderr}"
    return repository


@pytest.fixture(scope="session")
def server(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """The real Triton server on the demo repository."""
    log = tmp_path_factory.mktemp("server") / "triton.log"
    with TritonServer(demo_repository, *free_ports(3), log=log) as running:
        yield running


@pytest.fixture(scope="session")
def grpc_client(server: TritonServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """A plain gRPC client of `server`."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        yield client


@pytest.fixture(scope="session")
def http_client(server: TritonServer) -> Iterator[tritonclient.http.InferenceServerClient]:
    """A plain HTTP client of `server`."""
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        yield client


@pytest.fixture(params=["http", "grpc", "grpc stream"])
def asker(
    request: pytest.FixtureRequest,
    server: TritonServer,
    http_client: Any,
    grpc_client: Any,
) -> Iterator[Asker]:
    """Asks one turn over each protocol."""
    if request.param == "http":
        yield lambda *args, **kwargs: ask(http_client, *args, **kwargs)
    elif request.param == "grpc":
        yield lambda *args, **kwargs: ask(grpc_client, *args, **kwargs)
    else:
        with Stream(server.grpc_address) as stream:
            yield lambda *args, **kwargs: whole(stream.turn(*args, **kwargs))
