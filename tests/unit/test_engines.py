"""Several servers kept serving side by side, with stand-ins for Triton; metrics of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llava_sagemaker.adapter.metrics import joined

from llava_triton.server.engines import Engines, servers_on
from llava_triton.server.machine import Share
from llava_triton.server.server_error import ServerError, StartCrashError
from tests.waiting import wait_until


class Server:
    """Serves until something happens to it."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.starts = 0
        self.stops = 0
        self.happens: str | None = None
        self.fails: Exception | None = None

    def start(self, timeout: float, give_up: Callable[[], bool]) -> None:
        self.happens = None
        if self.fails is not None:
            raise self.fails
        self.starts += 1

    def fault(self) -> str | None:
        return self.happens

    def log_tail(self) -> str:
        return ""

    def stop(self, *, at_once: bool = False) -> None:
        self.stops += 1


def fails(look: Callable[[], None]) -> bool:
    """False, or what it raises."""
    look()
    return False


def test_one_that_dies_is_started_again_alone(tmp_path: Path) -> None:
    said: list[str] = []
    servers: list[Any] = [Server(tmp_path), Server(tmp_path)]
    engines = Engines(servers, said.append, restarts=1)
    engines.start()
    wait_until(lambda: engines.starts == (1, 1))
    servers[1].happens = "it has died"
    wait_until(lambda: engines.starts == (1, 2))
    engines.look()
    assert said == ["engine 1: it has died: starting Triton again; its sessions are lost"]
    servers[1].happens = "it has died"

    def ended() -> bool:
        try:
            engines.look()
        except ServerError as error:
            return "engine 1: it has died; parts of Triton died 2 times" in str(error)
        return False

    wait_until(ended)
    assert (servers[0].starts, servers[0].stops) == (1, 0)  # it serves on
    engines.stop()
    assert servers[0].stops > 0


@pytest.mark.parametrize("fault", [ServerError("no such model"), ValueError("a mistake of ours")])
def test_a_start_that_fails_is_told(tmp_path: Path, fault: Exception) -> None:
    servers: list[Any] = [Server(tmp_path)]
    servers[0].fails = fault
    engines = Engines(servers, print)
    engines.start()
    with pytest.raises(type(fault), match=str(fault)):
        wait_until(lambda: fails(engines.look))
    engines.stop()


def test_a_failed_restart_is_one_more_fault(tmp_path: Path) -> None:
    servers: list[Any] = [Server(tmp_path)]
    engines = Engines(servers, lambda _: None, restarts=1)
    engines.start()
    wait_until(lambda: engines.starts == (1,))
    servers[0].fails = ServerError("its port is taken")
    servers[0].happens = "it has died"
    with pytest.raises(ServerError, match="its port is taken; parts of Triton died 2 times"):
        wait_until(lambda: fails(engines.look))
    engines.stop()


def test_a_crash_at_the_first_start_is_tried_again(tmp_path: Path) -> None:
    servers: list[Any] = [Server(tmp_path)]
    said: list[str] = []

    def mended(text: str) -> None:
        said.append(text)
        servers[0].fails = None

    servers[0].fails = StartCrashError("it did not start")
    engines = Engines(servers, mended)
    engines.start()
    wait_until(lambda: engines.starts == (1,))
    engines.stop()
    assert said == ["it did not start: starting Triton again; its sessions are lost"]


def test_ports_of_several(tmp_path: Path) -> None:
    servers = servers_on(tmp_path, [Share(), Share()], [8000, 8001, 8002])
    assert [list(server.ports.values()) for server in servers] == [
        [8000, 8001, 8002],
        [8003, 8004, 8005],
    ]
    named = servers_on(tmp_path, [Share(), Share()], [1, 2, 3, 7, 8, 9])
    assert list(named[1].ports.values()) == [7, 8, 9]


PAGE = """\
# HELP llava_sessions Open sessions
# TYPE llava_sessions gauge
llava_sessions{state="active"} 3
llava_sessions{state="idle"} 4
# HELP nv_cpu_utilization CPU utilization rate [0.0 - 1.0]
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.25
"""


def test_metrics_of_several_engines_are_one_page() -> None:
    page = joined([PAGE, "", PAGE.replace("} 3", "} 5")])
    assert page.splitlines() == [
        "# HELP llava_sessions Open sessions",
        "# TYPE llava_sessions gauge",
        'llava_sessions{state="active",engine="0"} 3',
        'llava_sessions{state="idle",engine="0"} 4',
        'llava_sessions{state="active",engine="2"} 5',
        'llava_sessions{state="idle",engine="2"} 4',
        "# HELP nv_cpu_utilization CPU utilization rate [0.0 - 1.0]",
        "# TYPE nv_cpu_utilization gauge",
        'nv_cpu_utilization{engine="0"} 0.25',
        'nv_cpu_utilization{engine="2"} 0.25',
    ]
    assert joined([""]) == ""
