"""The image for SageMaker, as far as it can be told without building it: no docker daemon here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.conftest import ROOT

DOCKERFILE = ROOT / "sagemaker" / "Dockerfile"
SERVE = ROOT / "sagemaker" / "serve"
LINES = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()


def test_lint() -> None:
    lint = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_what_it_copies_is_there() -> None:
    copied = [
        source
        for line in LINES
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
        if not source.startswith("--")
    ]
    assert len(copied) > 5
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_wheel_has_the_extras_it_installs() -> None:
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_sagemaker_may_choose_the_port_and_nothing_runs_as_root() -> None:
    assert "LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true" in LINES
    users = [line.split()[1] for line in LINES if line.startswith("USER ")]
    assert users[-1].isdigit()
    assert int(users[-1]) > 0


def test_serve_starts_the_container() -> None:
    """As SageMaker calls it, here without a model."""
    assert os.access(SERVE, os.X_OK)
    (entry_point,) = (line for line in LINES if line.startswith("ENTRYPOINT"))
    assert entry_point == 'ENTRYPOINT ["/usr/local/bin/serve"]'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [SERVE, "serve"],
        env={**os.environ, "PATH": path, "SAGEMAKER_BIND_TO_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/opt/ml/model is no model repository" in done.stderr
    assert "Traceback" not in done.stderr
