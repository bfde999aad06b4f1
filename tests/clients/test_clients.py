"""The libraries that people use, unmodified, against the running server.

Each script runs in an environment of its own, which `make clients` makes: the libraries are heavy,
and some contradict what the server needs.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from llava_sagemaker.local.bearer_token import local_token
from llava_sagemaker.local.instances import LocalInstance
from llava_sagemaker.local.runtime import make_app

from llava_triton.client import Session
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.adapter_process import Adapter
from tests.clients.given import Given
from tests.conftest import ROOT

PICTURE = ROOT / "examples" / "pictures" / "five-shapes.png"
QUESTIONS = ("How many shapes are there?", "What colour is the circle?")
ENVIRONMENT = ROOT / ".venv-clients"
ENDPOINT = "local"
PATIENCE_SECONDS = 300.0


class AdapterInstance(LocalInstance):
    """An adapter that runs already, as the one instance of a local SageMaker endpoint."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(1, Path("none"), Path("none"))
        self.port = adapter.port
        self.in_service = True

    def look(self) -> None:
        pass

    def has_ended(self) -> bool:
        return False


@pytest.fixture(scope="module")
def runtime_url(adapter: Adapter) -> Iterator[str]:
    """A local SageMaker runtime in front of `adapter`."""
    (port,) = free_ports(1)
    app = make_app(ENDPOINT, [AdapterInstance(adapter)])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.force_exit = server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def given(server: TritonServer, adapter: Adapter, runtime_url: str) -> Given:
    """What Triton answers itself is what all clients must be answered."""
    with Session.open(f"grpc://{server.grpc_address}", image=PICTURE) as session:
        first, second = (session.ask(question).text for question in QUESTIONS)
    return Given(
        openai_url=f"http://127.0.0.1:{adapter.port}/v1",
        runtime_url=runtime_url,
        endpoint=ENDPOINT,
        token=local_token(),
        picture=base64.b64encode(PICTURE.read_bytes()).decode(),
        questions=QUESTIONS,
        answers=(first, second),
    )


def run(command: list[str | Path], given: Given) -> None:
    """A client's script; its assertions are ours."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **given.to_environment(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        timeout=PATIENCE_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize("client", ["openai", "langchain", "litellm", "strands", "boto3"])
def test_python_client(given: Given, client: str) -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip("`make clients` makes the clients' environment")
    run([python, "-m", f"tests.clients.{client}_sdk"], given)


def test_vercel_ai_sdk(given: Given) -> None:
    node, folder = shutil.which("node"), ROOT / "tests" / "clients" / "vercel"
    if node is None or not (folder / "node_modules").exists():
        pytest.skip("Node is not there, or `make clients` has not run")
    run([node, folder / "vercel_sdk.mjs"], given)
