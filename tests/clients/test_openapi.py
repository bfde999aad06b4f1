"""The adapter's OpenAPI description is true: schemathesis asks a real server what it allows.

Beside what the description allows it sends what it forbids. `LLAVA_OPENAPI_EXAMPLES` sets how many
bodies each path gets; 10, the default, makes some 700 requests, and 1700 some 21,500.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.adapter_process import Adapter
from tests.clients.test_clients import ENVIRONMENT

EXAMPLES = os.environ.get("LLAVA_OPENAPI_EXAMPLES", "10")
NOT_SAID = (
    # A schema cannot say it: who takes turns, which hosts are allowed.
    "positive_data_acceptance",
    # No path makes what another one deletes: sessions have their clients' names.
    "use_after_free",
    "ensure_resource_availability",
)
NOT_ASKED = "/invocations"
"""Opens sessions; `test_adapter_any_json` asks there."""


def test_schemathesis_finds_nothing(adapter: Adapter, tmp_path: Path) -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip("`make clients` makes the clients' environment")
    url = f"http://127.0.0.1:{adapter.port}/openapi.json"
    command = [str(python), "-m", "schemathesis.cli", "run", url, "--max-examples", EXAMPLES]
    command += ["--exclude-path", NOT_ASKED, "--exclude-checks", ",".join(NOT_SAID)]
    command += ["--generation-deterministic", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    print(done.stdout)  # how many requests it were, for `pytest -s`
    hello = b'{"messages": [{"role": "user", "content": "Hello!"}]}'
    answer = adapter.request(
        "POST", "/v1/chat/completions", hello, {"Content-Type": "application/json"}
    )
    assert answer.json["choices"][0]["message"]["content"]
