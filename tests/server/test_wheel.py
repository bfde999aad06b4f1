"""The wheel that the repository makes, outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAGE = re.search(
    r"AS wheel\n(.*?)\nFROM ", (ROOT / "sagemaker" / "Dockerfile").read_text(), re.DOTALL
)


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment's programs: the wheel, made of what the container's is made of, and the
    packages that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    assert STAGE
    for line in re.findall(r"^COPY (.+) \S+$", STAGE[1], re.MULTILINE):
        for name in line.split():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=unwanted)
            else:
                shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("llava_triton-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "those-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_the_demo_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    here = tmp_path / "empty"
    here.mkdir()
    environment = {**os.environ, "LLAVA_REPOSITORIES": str(tmp_path / "repositories")}
    environment.pop("PYTHONPATH", None)
    script = "import llava_triton, llava_cli; print(llava_triton.__file__, llava_cli.__file__)"
    used = run(installed / "python", "-c", script, cwd=here, env=environment)
    assert str(ROOT) not in used
    told = run(installed / "llava-triton", "demo", cwd=here, env=environment)
    assert "How many shapes are there?\n  LLaVA  There are five shapes." in told
    assert told.endswith("Stopping Triton ... stopped.\n")
    assert list(here.iterdir()) == []
