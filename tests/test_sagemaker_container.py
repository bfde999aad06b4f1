"""The container's entry point on a folder like /opt/ml/model, with the real Triton."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.container_process import CLOSED_SESSION, Container, question, text_of

PICTURE = ROOT / "examples" / "pictures" / "five-shapes.png"
LONG = {"max_tokens": 900, "ignore_eos": True}


@pytest.fixture
def container(demo_repository: Path, tmp_path: Path) -> Iterator[Container]:
    container = Container(demo_repository, tmp_path / "log")
    try:
        container.wait_until_ready()
        yield container
    finally:
        container.stop()


def assert_all_gone(processes: list[psutil.Process], regions: set[str]) -> None:
    """Everything the container had started is gone, and so is its shared memory."""
    _, alive = psutil.wait_procs(processes, timeout=20.0)
    assert not alive
    assert shared_memory() <= regions


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("llava-triton-server-*")}


def open_session(container: Container) -> str:
    opened = container.invoke(PICTURE.read_bytes(), "NEW_SESSION", "image/png")
    assert opened.status == 200, opened.body
    return opened.new_session


def test_a_conversation_a_lost_model_and_an_orderly_end(container: Container) -> None:
    # A conversation.
    session = open_session(container)
    first = text_of(container.invoke(question("How many shapes are there?"), session))
    assert "five" in first
    assert container.invoke({"requestType": "CLOSE"}, session).headers[CLOSED_SESSION] == session
    gone = container.invoke(question("And now?"), session)
    assert (gone.status, gone.code) == (400, "session_not_found")

    # kill -9 of the language model's process in the middle of an answer.
    session = open_session(container)
    events = container.events(question("How many shapes are there?", **LONG), session)
    assert "error" not in next(events)
    container.kill("language_model")
    assert "error" in list(events)[-1]
    container.wait_until(lambda: container.ping() == 503, "/ping 503")
    container.wait_until_ready()
    assert "starting Triton again" in container.output
    lost = container.invoke(question("How many shapes are there?"), session)
    assert (lost.status, lost.code) == (400, "session_not_found")
    session = open_session(container)
    assert text_of(container.invoke(question("How many shapes are there?"), session)) == first

    # SIGTERM while an answer is under way: it ends as it should, then everything does.
    events = container.events(question("How many shapes are there?", **LONG), session)
    pieces = [next(events)]
    everything = container.descendants()
    os.kill(container.process.pid, signal.SIGTERM)
    os.kill(container.process.pid, signal.SIGTERM)  # a second one changes nothing
    pieces += events
    assert pieces[-1]["finish_reason"] == "length"
    assert container.wait() == 0, container.output
    assert container.output.rstrip().endswith("stopped")
    assert_all_gone(everything, set())


@pytest.mark.parametrize("victim", ["tritonserver --model", "llava_sagemaker.adapter", None])
def test_it_ends_when_a_part_dies(
    demo_repository: Path, tmp_path: Path, victim: str | None
) -> None:
    regions = shared_memory()
    container = Container(demo_repository, tmp_path / "log")
    try:
        container.wait_until_ready()
        everything = container.descendants()
        if victim is None:  # the entry point itself: SageMaker, or the kernel short of memory
            container.process.kill()
            assert container.wait() == -signal.SIGKILL
        else:
            container.kill(victim)
            assert container.wait() == 1
            assert "has died" in container.output
            assert "Traceback" not in container.output
        assert_all_gone(everything, regions)
    finally:
        container.stop()


def test_a_signal_while_loading(demo_repository: Path, tmp_path: Path) -> None:
    regions = shared_memory()
    container = Container(demo_repository, tmp_path / "log")
    try:
        container.wait_until(lambda: "starting Triton" in container.output, "the start")
        everything = container.descendants()
        assert container.ping() != 200
        container.process.terminate()
        assert container.wait() == 0, container.output
        assert_all_gone(everything, regions)
    finally:
        container.stop()


def test_a_port_that_is_taken(demo_repository: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        container = Container(demo_repository, tmp_path / "log", port=port)
        try:
            assert container.wait() == 1
            assert f"port {port}" in container.output
            assert "Traceback" not in container.output
        finally:
            container.stop()


def test_no_model(tmp_path: Path) -> None:
    container = Container(tmp_path, tmp_path / "log")
    try:
        assert container.wait() == 1
        assert "is no model repository" in container.output
        assert "Traceback" not in container.output
    finally:
        container.stop()


def test_with_little_shared_memory(demo_repository: Path, tmp_path: Path) -> None:
    """A /dev/shm of 64 MiB, as docker gives it."""
    small = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    able = subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True, check=False)
    if able.returncode:
        pytest.skip("needs the right to mount a file system of its own")
    before = ["unshare", "-m", "sh", "-c", f'{small} && exec "$@"', "sh"]
    container = Container(demo_repository, tmp_path / "log", before)
    try:
        container.wait_until_ready()
        sessions = [open_session(container) for _ in range(8)]
        for session in sessions:
            asked = container.invoke(question("How many shapes are there?"), session)
            assert "five" in text_of(asked)
    finally:
        container.stop()


def test_the_entry_point_is_what_the_image_runs() -> None:
    serve = (ROOT / "sagemaker" / "serve").read_text()
    assert "-m llava_sagemaker.container" in serve
    lint = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "sagemaker" / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr
