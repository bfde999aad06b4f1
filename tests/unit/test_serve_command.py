"""What `llava-triton serve` does about a session adapter that cannot serve."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from llava_sagemaker import adapter_process
from llava_sagemaker.adapter_process import KeptAdapter
from typer.testing import CliRunner

from llava_cli.app import app
from llava_triton.server import foreground, machine
from llava_triton.server.restarts import RESTARTS
from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import TritonServer, free_ports


class Dying:
    """An adapter that dies whenever it is started.

    Args:
        started: gets the times.
    """

    def __init__(self, started: list[float]) -> None:
        self._started = started

    def start(self) -> None:
        self._started.append(time.monotonic())

    def exit_status(self) -> int:
        return 1

    def stop(self, patience: float) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the adapter was started, which dies each time."""
    times: list[float] = []
    monkeypatch.setattr(adapter_process, "AdapterProcess", lambda *_: Dying(times))
    return times


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TritonServer:
    """One that is never started."""
    server = TritonServer(tmp_path, *free_ports(3))
    monkeypatch.setattr(server, "start", lambda *_, **__: None)
    monkeypatch.setattr(server, "fault", lambda: None)
    return server


def keep(server: TritonServer, restarts: int) -> KeptAdapter:
    (port,) = free_ports(1)
    return KeptAdapter("127.0.0.1", port, [server], restarts)


def test_a_dead_adapter_is_started_again_after_growing_pauses(
    started: list[float], server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    kept = keep(server, RESTARTS)

    def look_on() -> None:
        nonlocal now
        while now < 100.0:
            kept.look()
            now += 0.25

    kept.start()
    with pytest.raises(ServerError, match=rf"exit status 1\), {RESTARTS + 1} times in 10 minutes"):
        look_on()
    pauses = [after - before for before, after in itertools.pairwise(started)]
    assert pauses == pytest.approx([1.0, 2.0, 4.0], abs=0.5)


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in foreground.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals", "started")
def test_ready_is_not_said_of_a_dead_adapter(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert foreground.serve([server], companion=keep(server, 0)) == 1
    told = capsys.readouterr()
    assert "error: the session adapter has died (exit status 1)" in told.err
    assert "ready after" not in told.out


@pytest.mark.usefixtures("own_signals", "started")
def test_what_is_open_to_others_is_told(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = keep(server, 0)
    foreground.serve([server], companion=kept)
    assert "open to others" not in capsys.readouterr().out
    kept.host = "0.0.0.0"
    foreground.serve([server], companion=kept)
    told = capsys.readouterr()
    assert "OpenAI's port is open to others at 0.0.0.0" in told.out
    assert "Triton's own ports are for trusted networks only" in told.out


def test_a_wrong_key_is_told_before_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "two words")
    done = CliRunner().invoke(app, ["serve", "no-such-model"])
    assert done.exit_code == 1
    assert done.output.startswith("error: LLAVA_API_KEY must be of printable ASCII without spaces")


def test_an_option_that_is_none_ends_with_2() -> None:
    assert CliRunner().invoke(app, ["bench", "--sessions", "many"]).exit_code == 2


def test_several_engines_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 5, 6})
    monkeypatch.delenv("LLAVA_ENGINES", raising=False)
    assert machine.shares() == [machine.Share()]
    two = machine.shares(2)
    assert [share.cores for share in two] == [frozenset({0, 1}), frozenset({2, 5, 6})]
    assert all(share.environment == {"LLAVA_ENGINES": "2"} for share in two)
    many = machine.shares(6)  # more than cores: some of them share one
    assert [len(share.cores or ()) for share in many] == [1] * 6
    monkeypatch.setenv("LLAVA_ENGINES", "3")
    assert len(machine.shares()) == 3
    for wrong in ("two", "0", "-1"):
        monkeypatch.setenv("LLAVA_ENGINES", wrong)
        with pytest.raises(ServerError, match="LLAVA_ENGINES is"):
            machine.shares()


def test_an_engine_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_ENGINES", raising=False)
    gpus = ["0", "1", "GPU-8f2e"]
    monkeypatch.setattr(machine, "visible_gpus", lambda: gpus)
    found = machine.shares()
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in found] == gpus
    assert [share.cores for share in found] == [None] * 3
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in machine.shares(1)] == ["0"]
    with pytest.raises(ServerError, match=r"4 engines were asked for .*; at most 3, one a GPU"):
        machine.shares(4)
    gpus[1:] = []
    assert machine.shares() == [machine.Share()]  # as without any of this
