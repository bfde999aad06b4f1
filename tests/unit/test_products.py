"""Products with the weights, in the layout that the device reads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llava_triton.kernels import ROUNDINGS, kernels_for
from llava_triton.kernels.base import Linear
from llava_triton.kernels.cpu.linear import INT8_ROWS, CpuLinear
from llava_triton.kernels.int4 import GROUPS, Int4Weight

ROWS = [1, 2, 3, 4, 13, 14, 15, 29, 71]
"""Around the sizes at which the kernel goes another way."""
SHAPES = [(768, 2304), (64, 48), (72, 33), (5, 7), (2047, 31), (1, 1)]
"""Inputs and outputs; of whole panels and pairs, and not."""


def make(weight: Tensor, bias: Tensor | None = None, rounded: str = "unrounded") -> Linear:
    return kernels_for(torch.device("cpu")).make_linear(ROUNDINGS[rounded](weight), bias)


@cache
def of_shape(
    dtype: torch.dtype, inputs: int, outputs: int, biased: bool, rounded: str
) -> tuple[Linear, Tensor, Tensor | None]:
    """A product, and its weights and bias in float64."""
    torch.manual_seed(inputs)
    weight = torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    kept = ROUNDINGS[rounded](weight)
    exact = kept if isinstance(kept, Tensor) else kept.dequantized(torch.float32)
    return make(weight, bias, rounded), exact.double(), None if bias is None else bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rounded", ROUNDINGS)
def test_products_are_those_of_torch(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, rounded: str
) -> None:
    product, exact, shift = of_shape(dtype, inputs, outputs, biased, rounded)
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs).to(dtype)
    result = product(x)
    expected = functional.linear(x.double(), exact, shift)
    # Of the size of a sum's terms together: they may cancel out. Beside 4-bit weights tokens are
    # rounded, too, to 65,535 levels.
    least = 2e-4 if rounded == "int4" else 1e-6
    tolerance = (least if dtype == torch.float32 else 1e-2) * max(inputs, 4) ** 0.5
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", ROUNDINGS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_those_beside_it(
    dtype: torch.dtype, rounded: str, rows: int, threads: int
) -> None:
    product, _, _ = of_shape(dtype, 768, 2304, False, rounded)
    torch.manual_seed(rows)
    x = torch.randn(rows, 768).to(dtype)
    usual = torch.get_num_threads()
    # In bfloat16 8-bit weights are added up in one order for few rows, and in another for many.
    few = INT8_ROWS[torch.bfloat16]
    beside = few if rounded == "int8" and dtype == torch.bfloat16 and rows > few else 0
    fill = torch.zeros(beside, 768, dtype=dtype)
    alone = torch.cat([product(torch.cat([row[None], fill]))[:1] for row in x])
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(x), alone)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [1, 30])
def test_sums_of_4_bit_weights_are_exact(group: int, rows: int) -> None:
    """Tokens that are integers, of which the largest is 32767, are not rounded."""
    torch.manual_seed(group)
    outputs, groups, inputs = 40, 3, 3 * group - 8
    weight = Int4Weight(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8),
        torch.randint(1, 3, (outputs, groups)).float(),
        torch.randint(0, 16, (outputs, groups), dtype=torch.uint8),
        group,
        torch.float32,
    )
    x = torch.randint(-300, 300, (rows, inputs)).float()
    x[:, ::group] = 32767.0
    expected = x.double() @ weight.dequantized(torch.float64).T
    assert torch.equal(CpuLinear(weight, None)(x).double(), expected)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 30])
def test_what_is_no_number_makes_none(wrong: float, rows: int) -> None:
    product = make(torch.randn(40, 300), rounded="int4")
    x = torch.randn(rows, 300)
    x[-1, 77] = wrong
    result = product(x)
    assert result[-1].isnan().all()
    assert result[:-1].isfinite().all()
    assert torch.equal(product(torch.full((rows, 300), 1e-38)), torch.zeros(rows, 40))


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
    only = "products_are_those or does_not_depend or are_exact"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", only],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
