"""The container's entry point on a folder like /opt/ml/model, with the real Triton."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.container_process import CLOSED_SESSION, Container, question, text_of

PICTURE = ROOT / "examples" / "pictures" / "five-shapes.png"
LONG = {"max_tokens": 900, "ignore_eos": True}


def small_shared_memory() -> list[str]:
    """A command that gives what it starts a /dev/shm of 64 MiB, as docker does; nothing where that
    is not allowed."""
    small = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    able = subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True, check=False)
    if able.returncode:
        warnings.warn("no right to mount: tried with the /dev/shm there is", stacklevel=2)
        return []
    return ["unshare", "-m", "sh", "-c", f'{small} && exec "$@"', "sh"]


@pytest.fixture
def container(demo_repository: Path, tmp_path: Path) -> Iterator[Container]:
    """One that serves, although /dev/shm is small and another program took Triton's port while
    Triton was loading."""
    container = Container(demo_repository, tmp_path / "log", before=small_shared_memory())
    try:
        with socket.socket() as thief:
            container.wait_until(lambda: bool(container.triton_ports()), "the adapter")
            (port,) = container.triton_ports()
            thief.bind(("127.0.0.1", port))
            thief.listen()
            container.wait_until_ready()
            assert container.triton_ports() != {port}
            assert f"port {port} (grpc)" in container.output
        yield container
    finally:
        container.stop()


def assert_all_gone(processes: list[psutil.Process], regions: Sequence[Path] = ()) -> None:
    """Everything the container had started is gone, and so is its shared memory."""
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=20.0)
    assert not alive
    assert [region for region in regions if region.exists()] == []


def open_session(container: Container) -> str:
    opened = container.invoke(PICTURE.read_bytes(), "NEW_SESSION", "image/png")
    assert opened.status == 200, opened.body
    return opened.new_session


def test_a_conversation_a_lost_model_and_an_orderly_end(container: Container) -> None:
    # A conversation, beside others that open at the same time.
    with ThreadPoolExecutor(8) as pool:
        session, *others = pool.map(lambda _: open_session(container), range(8))
    for other in others:
        assert container.invoke({"requestType": "CLOSE"}, other).status == 200
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

    # SIGTERM while an answer is in flight: it ends as it should, then everything does.
    events = container.events(question("How many shapes are there?", **LONG), session)
    pieces = [next(events)]
    everything = container.descendants()
    os.kill(container.process.pid, signal.SIGTERM)
    os.kill(container.process.pid, signal.SIGTERM)  # a second one changes nothing
    pieces += events
    assert pieces[-1]["finish_reason"] == "length"
    assert container.wait() == 0, container.output
    assert container.output.rstrip().endswith("stopped")
    assert_all_gone(everything)


@pytest.mark.parametrize("victim", ["bin/tritonserver", "llava_sagemaker.adapter"])
def test_what_dies_is_started_again(demo_repository: Path, tmp_path: Path, victim: str) -> None:
    container = Container(demo_repository, tmp_path / "log")
    try:
        container.wait_until_ready()
        session = open_session(container)
        container.kill(victim)
        container.wait_until(lambda: "has died" in container.output, "news of it")
        container.wait_until(lambda: container.ping() != 200, "/ping to say so")
        container.wait_until_ready()
        answer = container.invoke(question("How many shapes are there?"), session)
        if victim == "llava_sagemaker.adapter":  # sessions are the engines'
            assert "five" in text_of(answer)
        else:
            assert answer.code == "session_not_found", answer.body
            open_session(container)
        assert "Traceback" not in container.output
    finally:
        container.stop()


@pytest.mark.parametrize("victim", ["bin/tritonserver", "llava_sagemaker.adapter", None])
def test_it_ends_when_a_part_dies_too_often(
    demo_repository: Path, tmp_path: Path, victim: str | None
) -> None:
    container = Container(demo_repository, tmp_path / "log", before=["env", "LLAVA_RESTARTS=0"])
    try:
        container.wait_until_ready()
        everything, regions = container.descendants(), container.shared_memory()
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
    container = Container(demo_repository, tmp_path / "log")
    try:
        guard = "server_guard"  # its command line contains Triton's
        container.wait_until(
            lambda: bool(
                {*container.descendants("bin/tritonserver")} - {*container.descendants(guard)}
            ),
            "Triton",
        )
        everything, regions = container.descendants(), container.shared_memory()
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


def test_settings_that_do_not_exist(demo_repository: Path, tmp_path: Path) -> None:
    said = 'LLAVA_CHANGED_SETTINGS={"max_session": 3}'
    container = Container(demo_repository, tmp_path / "log", before=["env", said])
    try:
        assert container.wait() == 1
        assert "unknown settings: max_session" in container.output
        assert "Traceback" not in container.output
    finally:
        container.stop()
