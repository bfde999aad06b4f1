"""The worked examples run as they stand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_triton.server.triton_server import TritonServer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PICTURES = sorted((EXAMPLES / "pictures").iterdir())


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("picture", [None, PICTURES[-1]])
def test_http_unary(server: TritonServer, picture: Path | None) -> None:
    more = [] if picture is None else [picture]
    output = run(sys.executable, EXAMPLES / "http_unary.py", server.http_address, *more)
    lines = output.splitlines()
    assert len(lines) == 9
    assert lines[0] == "Describe the picture."
    assert all(line.strip() for line in lines)
    assert "prompt tokens reused" in lines[8]
    assert "(0 of" not in lines[8]


def test_grpc_unary(server: TritonServer) -> None:
    lines = run(sys.executable, EXAMPLES / "grpc_unary.py", server.grpc_address).splitlines()
    assert lines[0] == "How many shapes are there?"
    assert lines[1].strip()
    assert lines[-1].startswith("After the end: ")
    assert "NOT_FOUND: the session is unknown or has expired" in lines[-1]


def test_grpc_streaming(server: TritonServer) -> None:
    lines = run(sys.executable, EXAMPLES / "grpc_streaming.py", server.grpc_address).splitlines()
    assert len(lines) == 6
    assert all(line.strip() for line in lines)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_session_client(server: TritonServer, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    lines = run(sys.executable, EXAMPLES / "session_client.py", url).splitlines()
    assert "reused" in lines[1]
    assert lines[2].startswith("Refused: INVALID_ARG: sampling parameter temperature is 9")
    assert len(lines) == (4 if protocol == "grpc" else 3)


def test_curl(server: TritonServer) -> None:
    lines = run("sh", EXAMPLES / "curl.sh", server.http_address).splitlines()
    assert len(lines) == 2
    answers = []
    for line in lines:
        tensors = {output["name"]: output["data"] for output in json.loads(line)["outputs"]}
        assert tensors.pop("logprobs") == []
        outputs = {name: data[0] for name, data in tensors.items()}
        assert outputs["text_output"]
        assert outputs["finish_reason"] in ("stop", "length")
        answers.append(outputs)
    # Not zero where another session has shown the same picture.
    assert answers[0]["num_cached_tokens"] < answers[0]["num_input_tokens"]
    assert answers[1]["num_cached_tokens"] >= answers[0]["num_input_tokens"]
