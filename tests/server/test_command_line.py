"""`llava-triton`, as a person types it, on the real server."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llava_triton.contract.settings import Settings
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.checkpoints import tiny_llava
from tests.container_process import Instance
from tests.server_command import STOP_SECONDS, living

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "five-shapes.png"
PATIENCE_SECONDS = 60.0


def run(
    *arguments: str | Path, typed: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "llava_cli", *map(str, arguments)],
        input=typed,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_one_question(server: TritonServer, scheme: str) -> None:
    url = server.grpc_url if scheme == "grpc" else server.http_url
    done = run("ask", "--image", PICTURE, "How many shapes are there?", LLAVA_URL=url)
    assert (done.returncode, done.stdout) == (0, "There are five shapes.\n")
    assert "first token after" in done.stderr


def test_a_chat(server: TritonServer) -> None:
    lines = [
        f"/picture {PICTURE}",
        "How many shapes are there?",
        "How many of those are red?",
        "/picture no-such.png",
        "/back",
        "Where is the circle?",
        "/again",
        "/new",
        "Hello!",
    ]
    done = run("chat", server.grpc_url, typed="\n".join(lines) + "\n/quit\n")
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "There are five shapes." in told
    assert "the picture no-such.png cannot be read: No such file or directory" in told
    assert told.index("Three of them are red.") < told.index("The circle is at the bottom right.")
    assert told.count("prompt tokens reused") == 5


def test_bench_measures_every_session(server: TritonServer) -> None:
    load = ("--sessions", "3", "--turns", "2", "--tokens", "5")
    done = run("bench", server.grpc_url, *load, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert re.search(r"first token of a turn +\d+\.\d ms +\d+\.\d ms", done.stdout)
    reused = re.search(r"prompt tokens reused +(\d+) %", done.stdout)
    assert reused
    assert 50 < int(reused[1]) < 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ask", "--url", "grpc://localhost:1", "?"), "no server answers at localhost:1"),
        (("ask", "--url", "localhost", "?"), "the URL is 'localhost'; give grpc://host:port"),
        (("ask", "--image", "no-such.png", "?"), "the picture no-such.png cannot be read"),
        (("bench", "grpc://localhost:1"), "no server answers at localhost:1"),
        (("bench", "--image", __file__), f"{__file__} is no picture that can be read"),
        (("export", "no-such-model"), "no-such-model does not exist"),
        (("export", "demo", "--precision", "fp16"), "--precision fp16 is for --target gpu"),
        (("serve", "--weights", "int2"), "setting weights is 'int2'; it must be one of"),
        (("serve", "--settings", "no-such.json"), "no-such.json does not hold settings"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1


def test_settings_of_a_repository_are_its_own(demo_repository: Path) -> None:
    done = run("serve", demo_repository, LLAVA_MAX_SESSIONS="5")
    assert done.returncode == 1
    assert "is served with the settings that it was exported with" in done.stderr


def test_an_export_with_settings(tmp_path: Path) -> None:
    file, output = tmp_path / "settings.json", tmp_path / "exported"
    file.write_text(json.dumps({"max_sessions": 7, "default_max_tokens": 20}))
    model = tiny_llava(tmp_path / "checkpoint", image_size=56)
    done = run("export", model, "--output", output, "--settings", file, LLAVA_MAX_SESSIONS="5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{output} is ready\n")
    settings = Settings.of_repository(output)
    assert (settings.max_sessions, settings.default_max_tokens) == (5, 20)


def test_check_names_what_is_in_the_way() -> None:
    lacking = run("check", PATH="/nowhere", CXX="", COLUMNS="200")
    assert lacking.returncode == 1
    assert f"ok  Python     {platform.python_version()}" in lacking.stdout
    assert "apt-get install g++" in lacking.stdout


class Served(Instance):
    """`llava-triton serve` as a child process; a client of its OpenAI port."""

    def __init__(self, repository: Path) -> None:
        self.port, http, self.grpc, metrics = free_ports(4)
        options = ["--http-port", http, "--grpc-port", self.grpc, "--metrics-port", metrics]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava_cli", "serve", repository, *map(str, options)],
            env={**os.environ, "LLAVA_PORT": str(self.port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def adapter(self) -> psutil.Process:
        """The one that listens now."""
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "llava_sagemaker.adapter" in child.cmdline()
        ]
        return found

    def wait_until_well(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.ping() != 200:
            assert self.process.poll() is None, self.process.stdout and self.process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def served(demo_repository: Path) -> Iterator[Served]:
    served = Served(demo_repository)
    yield served
    served.process.kill()
    served.process.wait()


def test_serve_looks_after_its_adapter_and_ends_it(served: Served) -> None:
    served.wait_until_well()
    adapter = served.adapter()
    adapter.kill()
    living_on = psutil.Process(served.process.pid)
    adapter.wait(STOP_SECONDS)
    served.wait_until_well()
    again = served.adapter()
    assert again.pid != adapter.pid
    family = [*living_on.children(recursive=True)]
    served.process.send_signal(signal.SIGTERM)
    output, _ = served.process.communicate(timeout=STOP_SECONDS)
    assert served.process.returncode == 0
    assert f"  OpenAI   http://127.0.0.1:{served.port}/v1\n" in output
    assert output.count("the session adapter has died (exit status -9): starting it again") == 1
    assert output.endswith("stopped\n")
    assert living(family) == []


def test_serve_wants_its_port(demo_repository: Path, server: TritonServer) -> None:
    taken = server.ports["http"]
    done = run("serve", demo_repository, "--port", str(taken))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: port {taken} (openai) on 127.0.0.1 is already taken")
