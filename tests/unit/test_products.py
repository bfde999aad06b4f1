"""Products with the weights, in the layout that the device reads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llava_triton.kernels import kernels_for
from llava_triton.kernels.base import Linear
from llava_triton.kernels.cpu.linear import INT8_ROWS
from llava_triton.kernels.int8 import Int8Weight

ROWS = [1, 2, 3, 4, 13, 14, 15, 29, 71]
"""Around the sizes at which the kernel goes another way."""
SHAPES = [(768, 2304), (64, 48), (72, 33), (5, 7), (2047, 31), (1, 1)]
"""Inputs and outputs; of whole panels and pairs, and not."""


def make(weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> Linear:
    return kernels_for(torch.device("cpu")).make_linear(weight, bias, int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_products_are_those_of_torch(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, int8: bool
) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    result = make(weight, bias, int8=int8)(x)
    exact = Int8Weight.of(weight).dequantized(torch.float32) if int8 else weight
    shift = None if bias is None else bias.double()
    expected = functional.linear(x.double(), exact.double(), shift)
    # Of the size of a sum's terms together: they may cancel out.
    tolerance = (1e-6 if dtype == torch.float32 else 1e-2) * max(inputs, 4) ** 0.5
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "int8"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_those_beside_it(
    dtype: torch.dtype, int8: bool, rows: int, threads: int
) -> None:
    torch.manual_seed(rows)
    product = make(torch.randn(2304, 768).to(dtype), int8=int8)
    x = torch.randn(rows, 768).to(dtype)
    usual = torch.get_num_threads()
    # In bfloat16 8-bit weights are added up in one order for few rows, and in another for many.
    few = INT8_ROWS[torch.bfloat16]
    beside = 0 if not int8 or dtype == torch.float32 or rows <= few else few
    fill = torch.zeros(beside, 768, dtype=dtype)
    alone = torch.cat([product(torch.cat([row[None], fill]))[:1] for row in x])
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(x), alone)
    finally:
        torch.set_num_threads(usual)


def test_what_cannot_be_multiplied_is_refused() -> None:
    product = make(torch.randn(8, 16))
    for wrong in (torch.randn(2, 15), torch.randn(2, 16).bfloat16(), torch.randn(16, 2).T):
        with pytest.raises(AssertionError):
            product(wrong)


FEWER = {"x86_64": ["-mno-amx-bf16", "-mno-amx-bf16 -mno-avx512f"]}
"""What leaves out instructions, by the machine; elsewhere only the optimizer makes fewer."""


@pytest.mark.parametrize("without", FEWER.get(platform.machine(), ["-fno-tree-vectorize"]))
def test_a_cpu_that_has_fewer_instructions_multiplies_the_same(
    tmp_path: Path, without: str
) -> None:
    # With options of its own, a compiler has a build of its own.
    environment = os.environ | {"CXX": f"c++ {without}", "XDG_CACHE_HOME": str(tmp_path)}
    only = "products_are_those or does_not_depend"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", only],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
