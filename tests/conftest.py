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

from llava_triton.server.triton_server import TritonServer, free_ports
from tests.adapter_process import Adapter
from tests.checkpoints import tiny_llava
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Alone, Ask, Start
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


@pytest.fixture(scope="module")
def adapter(server: TritonServer, demo_repository: Path) -> Iterator[Adapter]:
    """A session adapter in front of `server`, one a module."""
    adapter = Adapter(server, demo_repository)
    try:
        adapter.wait_until(lambda: adapter.ping() == 200)
        yield adapter
    finally:
        adapter.stop()


# Engines in the test's own process, on a tiny checkpoint.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: whatever a token attends to by mistake changes the answer."""
    folder = tmp_path_factory.mktemp("pressure") / "tiny"
    return tiny_llava(folder, text="mistral", kv_heads=2, image_size=56, seed=1)


@pytest.fixture(scope="module")
def quiet(checkpoint: Path) -> Iterator[EngineHarness]:
    """Room for everything; for right answers."""
    harness = EngineHarness(checkpoint)
    yield harness
    harness.shutdown()


@pytest.fixture
def alone(quiet: EngineHarness) -> Alone:
    """The answers to a conversation where nothing else is open."""

    def hold(*turns: Ask) -> list[str]:
        quiet.restart()
        return [turn.wait(quiet, "alone", start=index == 0)[0] for index, turn in enumerate(turns)]

    return hold


@pytest.fixture(params=[1, 2], ids=["one step at a time", "one step ahead"])
def start(
    checkpoint: Path, quiet: EngineHarness, request: pytest.FixtureRequest
) -> Iterator[Start]:
    """Starts engines; `blocks`, `pictures` and `host_pictures` limit their memories."""
    started: list[EngineHarness] = []

    def make(
        blocks: int | None = None,
        pictures: int | None = None,
        host_pictures: int | None = None,
        host_blocks: int | None = None,
        **limits: Any,
    ) -> EngineHarness:
        (features,) = quiet.features(PICTURES[:1])
        one = features.numel() * features.itemsize
        if blocks is not None:
            limits["kv_cache_bytes"] = blocks * quiet.runner.block_bytes
        if host_blocks is not None:
            limits["host_cache_bytes"] = max(1, host_blocks * quiet.runner.block_bytes)
        if pictures is not None:
            limits["image_features_bytes"] = pictures * one
        if host_pictures is not None:
            limits["host_cache_bytes"] = host_pictures * one
        started.append(EngineHarness(checkpoint, steps_at_once=request.param, **limits))
        return started[-1]

    yield make
    for harness in started:
        try:
            harness.check_state()
        finally:
            harness.shutdown()
