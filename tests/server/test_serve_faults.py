"""What the served models' clients and operator get when a part of the server dies or freezes: the
real binary, on two toy models that answer for ever or late, under the names of ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from llava_triton.client import ErrorCode, Session, SessionError
from llava_triton.contract.configuration import configured
from llava_triton.server.restarts import RESTARTS, RESTARTS_SECONDS, keep_serving
from llava_triton.server.server_guard import stubs
from llava_triton.server.triton_server import ServerError, free_ports
from tests.server_command import STOP_SECONDS, Command, Family

WITHIN_SECONDS = 10.0
CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: {decoupled} }}
input [ ]
output [ ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
MODEL = '''
import pathlib, threading, time
import triton_python_backend_utils as pb_utils
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta


def answer(text, finish_reason):
    arrays = ANSWER.to_arrays(Delta(text, finish_reason, 0, 0, 0, 0.0))
    return pb_utils.InferenceResponse([pb_utils.Tensor(*each) for each in arrays.items()])


class TritonPythonModel:
    """Loads when it may; opens sessions at once; answers questions for a minute."""

    def initialize(self, args):
        self.whole = args["model_name"] == "llava"
        repository = pathlib.Path(args["model_repository"]).parent
        while (repository / "hold").exists():
            time.sleep(0.05)

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.run, args=(request,)).start()

    def run(self, request):
        sender = request.get_response_sender()
        if request.flags() == 0:
            for _ in range(600):
                time.sleep(0.1)
                if not self.whole:
                    sender.send(answer("again", ""))
        sender.send(answer("", "prefilled"), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name, decoupled in (("llava", "false"), ("llava_stream", "true")):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(
            configured(CONFIG.format(name=name, decoupled=decoupled))
        )
        (folder / name / "1" / "model.py").write_text(MODEL)
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
        command.process.terminate()
        command.wait()


def process_of(model: str, family: Family) -> int:
    (found,) = [each for each, name in stubs(family.name).items() if name == model]
    return found


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (kill, "the process of llava_stream has died (signal 9)"),
        (stop, "the process of llava_stream is stopped"),
    ],
)
def test_a_lost_model_is_told_and_served_again(
    serve: Callable[..., Command],
    repository: Path,
    harm: Callable[[int], None],
    told: str,
) -> None:
    command = serve()
    family = command.wait_until_ready()
    (repository / "hold").touch()
    session = Session.open(command.grpc_url)
    pieces = iter(session.stream("?"))
    assert next(pieces) == "again"
    harmed_at = time.monotonic()
    harm(process_of("llava_stream", family))
    with pytest.raises(SessionError) as caught:
        list(pieces)
    # A second is aimed at, on an idle machine; unwatched, the stream is silent for ever.
    assert time.monotonic() - harmed_at < WITHIN_SECONDS
    assert caught.value.code is ErrorCode.UNAVAILABLE
    family.assert_gone(within=STOP_SECONDS)
    for url in (command.grpc_url, command.http_url):  # while it starts
        with pytest.raises(SessionError) as caught:
            Session.open(url)
        assert caught.value.code is ErrorCode.UNAVAILABLE
    (repository / "hold").unlink()
    command.wait_until_ready()
    assert next(iter(session.stream("?"))) == "again"  # by the same client
    assert f"{told}" in command.output
    assert "starting Triton again; its sessions are lost" in command.output


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_whoever_waits_for_a_whole_answer_hears_of_it(
    serve: Callable[..., Command], scheme: str
) -> None:
    command = serve("--no-restart")
    family = command.wait_until_ready()
    url = command.http_url if scheme == "http" else command.grpc_url
    with ThreadPoolExecutor() as pool:
        # A client of HTTP belongs to one thread.
        answer = pool.submit(lambda: Session.open(url).ask("?"))
        assert not wait([answer], timeout=0.5).done  # in flight by now, or soon
        kill(process_of("llava", family))
        failure = answer.exception(timeout=STOP_SECONDS)
    assert isinstance(failure, SessionError)
    assert failure.code is ErrorCode.UNAVAILABLE
    assert command.wait() == 1
    assert "error: the process of llava has died (signal 9)" in command.output
    assert "Traceback" not in command.output
    family.assert_gone(within=STOP_SECONDS)


def test_a_crash_of_triton_is_mended_too(serve: Callable[..., Command], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = serve("--log", str(log))
    os.kill(command.wait_until_ready().processes[0].pid, signal.SIGSEGV)
    command.wait_until_ready()
    # On a busy machine it is still printing its stack trace when it is looked at.
    told = r"the Triton server has crashed \(signal 11\)( and does not end)?: starting Triton again"
    assert re.search(told, command.output)
    assert log.read_text().count("Started HTTPService") == 2  # the log went on


def test_what_dies_too_often_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    said: list[str] = []
    starts: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: clock)
    monkeypatch.setattr("time.sleep", lambda _: None)

    def serve_for(seconds: float) -> None:
        def die() -> str:
            nonlocal clock
            clock += seconds
            return "the process of toy has died"

        starts.clear()
        keep_serving(
            lambda: starts.append(clock),
            die,
            lambda: None,
            said.append,
            told=lambda: len(starts) > 100,
        )

    with pytest.raises(ServerError, match=f"toy has died; .* died {RESTARTS + 1} times in 10 min"):
        serve_for(RESTARTS_SECONDS / (RESTARTS + 2))
    assert len(starts) == RESTARTS + 1
    assert said == ["the process of toy has died: starting Triton again; its sessions are lost"] * 3
    serve_for(RESTARTS_SECONDS / RESTARTS)  # rarely enough: for ever


def test_a_signal_while_it_starts_again(serve: Callable[..., Command], repository: Path) -> None:
    command = serve()
    family = command.wait_until_ready()
    (repository / "hold").touch()
    kill(process_of("llava", family))
    family.assert_gone(within=STOP_SECONDS)
    command.process.terminate()
    assert command.wait() == 0
    assert command.output.rstrip().endswith("stopped")


def test_open_ports_are_warned_of_once(serve: Callable[..., Command]) -> None:
    command = serve("--host", "0.0.0.0")
    command.wait_until_ready()
    assert command.output.count("warning: Triton's ports are open to others at 0.0.0.0") == 1
    assert "docs/triton-ports.md" in command.output


# What Python does with an exception that is raised in a finalizer: it prints it and goes on.
DROPPED = """
import os, signal, time
from llava_triton.server import foreground as server

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        (lambda: None)()

signal.signal(signal.SIGTERM, server.interrupt)
try:
    Finalized()
    time.sleep(20.0)
except KeyboardInterrupt:
    print("heard")
"""


def test_a_signal_that_a_finalizer_drops_is_heard() -> None:
    command = [sys.executable, "-c", DROPPED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=STOP_SECONDS)
    assert "Exception ignored" in done.stderr
    assert done.stdout == "heard\n"
