"""NVIDIA's load generator AIPerf against the running server: its report shows the cached tokens.

It lives in an environment of its own, `.venv-aiperf`, which `make aiperf` makes: it pins much.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.adapter_process import Adapter
from tests.conftest import ROOT

AIPERF = ROOT / ".venv-aiperf" / "bin" / "aiperf"
PATIENCE_SECONDS = 600.0
CONVERSATIONS, TURNS = 3, 3


def test_conversations_about_pictures(adapter: Adapter, tmp_path: Path) -> None:
    if not AIPERF.exists():
        pytest.skip("`make aiperf` makes its environment")
    command: list[str | Path] = [
        AIPERF,
        "profile",
        "--model",
        "llava",
        "--endpoint-type",
        "chat",
        "--streaming",
    ]
    command += ["--url", f"http://127.0.0.1:{adapter.port}"]
    command += ["--conversation-num", str(CONVERSATIONS)]
    command += ["--conversation-turn-mean", str(TURNS), "--conversation-turn-stddev", "0"]
    command += ["--image-width-mean", "56", "--image-height-mean", "56", "--image-format", "png"]
    command += ["--synthetic-input-tokens-mean", "12", "--synthetic-input-tokens-stddev", "0"]
    command += ["--output-tokens-mean", "6", "--concurrency", "2"]
    # Its prompts are made with the checkpoint's own tokenizer; the server's own counts are taken.
    command += ["--tokenizer", ROOT / "demo" / "checkpoint", "--use-server-token-count"]
    command += ["--no-gpu-telemetry", "--no-server-metrics", "--ui-type", "none"]
    command += ["--random-seed", "1", "--artifact-dir", tmp_path]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        timeout=PATIENCE_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    (records,) = tmp_path.rglob("profile_export.jsonl")
    told = [json.loads(line)["metrics"] for line in records.read_text().splitlines()]
    assert len(told) == CONVERSATIONS * TURNS
    cached = [each["usage_prompt_cache_read_tokens"]["value"] for each in told]
    prompts = [each["usage_prompt_tokens"]["value"] for each in told]
    # The first turn of a conversation may find nothing, later ones find what was said.
    assert sum(count > 0 for count in cached) >= CONVERSATIONS * (TURNS - 1)
    assert all(count < prompt for count, prompt in zip(cached, prompts, strict=True))
