"""The GPU kernels compiled for GPUs that are not here: each fits, and nothing is spilled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

CAPABILITIES = (80, 86, 89, 90)
"""Of an A100, an A10G, an L4 and an H100."""
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
"""Of a program, at the most."""
SECONDS = 600.0
LAUNCHES_OF_A_LAYER = 10
"""Of a decode step; docs/gpu.md has the number, too."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@cache
def _compiled(capability: int, folder: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels", str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(folder / str(capability))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_fits_without_spilling(capability: int, folder: Path) -> None:
    kernels = _compiled(capability, folder)["kernels"]
    names = {each["name"] for each in kernels}
    assert {"attend_one", "attend_many", "combine_one", "combine_many"} <= names
    assert {"rotate_and_store", "add_rms_norm", "silu_multiply"} <= names
    assert {"int8_product", "int4_product"} <= names
    for each in kernels:
        assert each["shared"] <= SHARED_KIB[capability] * 1024, each
        assert each["registers"] <= 255, each
        assert each["stack"] == 0, each


def test_launches_of_a_decode_step(folder: Path) -> None:
    told = _compiled(90, folder)["launches"]
    assert told["layers_2"] - told["layers_1"] == LAUNCHES_OF_A_LAYER
