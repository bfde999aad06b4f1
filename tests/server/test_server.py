"""The embedded server as a child process: the real binary, on a toy repository."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llava_triton.server.ports import PortError
from llava_triton.server.triton_server import ServerError, TritonServer, free_ports
from tests.server_command import SERVICES, STOP_SECONDS, Command, Family, living
from tests.triton import Stream

CONFIG = """
name: "toy"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
sequence_batching { oldest { max_candidate_sequences: 9 } }
input [ { name: "text_input" data_type: TYPE_STRING dims: [1] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [1] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
MODEL = '''
import threading, time
import llava_triton  # models must find the project's package
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Streams its text over and over, for a minute."""

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.stream, args=(request.get_response_sender(),)).start()

    def stream(self, sender):
        for _ in range(600):
            piece = pb_utils.Tensor("text_output", np.array([b"again"], dtype=np.object_))
            sender.send(pb_utils.InferenceResponse([piece]))
            time.sleep(0.1)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model repository, with a space in its path."""
    folder = tmp_path / "toy repository"
    (folder / "toy" / "1").mkdir(parents=True)
    (folder / "toy" / "config.pbtxt").write_text(CONFIG)
    (folder / "toy" / "1" / "model.py").write_text(MODEL)
    return folder


@pytest.fixture
def serve(repository: Path) -> Iterator[Callable[..., Command]]:
    """Starts the command; kills what a failed test leaves."""
    commands: list[Command] = []

    def start(*options: str) -> Command:
        commands.append(Command(repository, free_ports(3), *options))
        return commands[-1]

    yield start
    for command in commands:
        command.process.kill()
        command.process.wait()


def test_starts_answers_and_stops(repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "triton.log"
    with TritonServer(repository, *free_ports(3), log=log) as server:
        assert server.alive
        family = Family(server.pid)
        with Stream(server.grpc_address) as stream:
            stream.send("hello", session="one", start=True, model="toy")
            assert next(stream.pieces()).text == "again"
            stream.cancel()
    assert not server.alive
    family.assert_gone(within=STOP_SECONDS)
    assert "Started HTTPService" in log.read_text()
    server.stop()  # once more does no harm


def test_listens_on_loopback_alone(repository: Path) -> None:
    with TritonServer(repository, *free_ports(3)) as server:
        connections = psutil.Process(server.pid).net_connections(kind="inet")
        listening = [each.laddr for each in connections if each.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} == set(server.ports.values())
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("taken", range(3), ids=SERVICES)
def test_taken_port_is_one_clear_error(repository: Path, taken: int) -> None:
    ports = free_ports(3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[taken]))
        other.listen()
        with pytest.raises(PortError, match=f"port {ports[taken]} .* --{SERVICES[taken]}-port"):
            TritonServer(repository, *ports).start()


def test_same_port_twice_is_an_error(repository: Path) -> None:
    port = free_ports(1)[0]
    with pytest.raises(PortError, match="both http and grpc"):
        TritonServer(repository, port, port, port).start()


def test_missing_repository_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no model repository"):
        TritonServer(tmp_path / "nothing here", *free_ports(3)).start()


def test_model_that_fails_to_load_is_named_with_its_reason(repository: Path) -> None:
    model = repository / "toy" / "1" / "model.py"
    model.write_text("raise RuntimeError('no engine for this GPU')")
    server = TritonServer(repository, *free_ports(3))
    with pytest.raises(ServerError, match=r"toy: .*RuntimeError: no engine for this GPU") as caught:
        server.start()
    assert str(model) in str(caught.value)
    assert not server.alive


def test_server_that_is_not_ready_in_time_is_stopped(repository: Path) -> None:
    model = repository / "toy" / "1" / "model.py"
    model.write_text("import time; time.sleep(60)")
    server = TritonServer(repository, *free_ports(3))
    with pytest.raises(ServerError, match="not ready after 1 seconds"):
        server.start(timeout=1.0)
    assert not server.alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_signal_stops_the_command_in_mid_stream(
    serve: Callable[[], Command], number: signal.Signals
) -> None:
    command = serve()
    family = command.wait_until_ready()
    with Stream(f"127.0.0.1:{command.ports[1]}") as stream:
        stream.send("hello", session=7, start=True, model="toy")
        next(stream.pieces())
        os.killpg(command.process.pid, number)  # as a terminal sends it: to the whole group
        assert command.wait() == 0
        family.assert_gone(within=STOP_SECONDS)
    assert "ready" in command.output
    assert f"http://127.0.0.1:{command.ports[0]}" in command.output
    assert "Traceback" not in command.output


def test_signal_while_starting_leaves_nothing(serve: Callable[[], Command]) -> None:
    command = serve()
    process = psutil.Process(command.process.pid)
    while not (children := process.children(recursive=True)):
        time.sleep(0.02)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 0
    # The signal may come before the command has got to know the guard it is starting; then the
    # guard notices by itself.
    deadline = time.monotonic() + STOP_SECONDS
    while left := living(children):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_killed_server_is_reported_and_cleaned_up(serve: Callable[..., Command]) -> None:
    command = serve("--no-restart")
    family = command.wait_until_ready()
    family.processes[0].kill()
    assert command.wait() == 1
    family.assert_gone(within=STOP_SECONDS)
    assert "the Triton server has died (signal 9)" in command.output
    assert "Started HTTPService" in command.output
    assert "Traceback" not in command.output


def test_server_dies_with_its_killed_parent(serve: Callable[[], Command]) -> None:
    command = serve()
    family = command.wait_until_ready()
    command.process.kill()
    family.assert_gone(within=STOP_SECONDS)


def test_killed_guard_is_cleaned_up_by_the_parent(serve: Callable[..., Command]) -> None:
    command = serve("--no-restart")
    family = command.wait_until_ready()
    family.parents[0].kill()
    assert command.wait() == 1
    family.assert_gone(within=STOP_SECONDS)


def test_next_server_cleans_up_when_parent_and_guard_were_killed(
    serve: Callable[[], Command], repository: Path
) -> None:
    command = serve()
    family = command.wait_until_ready()
    family.parents[0].suspend()  # so that it cannot clean up
    command.process.kill()
    family.parents[0].kill()
    while living(family.parents):  # until then it holds its lock, and is none of the next one's
        time.sleep(0.01)
    with TritonServer(repository, *free_ports(3)):
        family.assert_gone(within=STOP_SECONDS)
