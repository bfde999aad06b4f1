"""The GPU kernels against the reference: on a GPU where there is one, else by Triton's interpreter.

The interpreter is chosen before `triton` is imported, and other tests may have imported it (torch
does, in parts): the tests of this module then run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_triton.kernels import gpu, kernels_for
from llava_triton.kernels.base import AttentionGeometry, Rows
from llava_triton.kernels.int4 import Int4Weight
from llava_triton.kernels.int8 import Int8Weight
from llava_triton.kernels.reference import ReferenceAttention
from llava_triton.model.sampling import Draw, gpu_draws, next_tokens
from tests.unit.test_paged_attention import Step

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
INTERPRETER_SECONDS = 600.0

if ON_GPU or INTERPRETED:
    from llava_triton.kernels.gpu.attention import (
        MAX_SPLITS,
        GpuAttention,
        add_rms_norm,
        int8_product,
        silu_multiply,
    )
    from llava_triton.kernels.gpu.linear import GpuLinear
    from llava_triton.kernels.gpu.parameters import Parameters
    from llava_triton.kernels.gpu.sampling import draw_tokens

runs_kernels = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="runs within test_by_the_interpreter"
)
needs_gpu = pytest.mark.skipif(
    not ON_GPU,
    reason="no GPU here to capture a CUDA graph on; the kernels themselves run in the interpreter",
)

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)


def geometry(
    heads: int, kv_heads: int, head_dim: int, window: int | None = None
) -> AttentionGeometry:
    return AttentionGeometry(heads, kv_heads, head_dim, head_dim**-0.5, window)


# Sequences are (tokens in the pages, new tokens).
RAGGED = [(37, 21), (150, 1), (0, 5), (15, 1), (16, 1), (0, 1)]
SMALL = [
    (geometry(2, 2, 16), RAGGED, torch.bfloat16),
    (geometry(3, 1, 18, window=20), RAGGED, torch.float32),
    (geometry(14, 2, 8, window=130), RAGGED, torch.float16),
    (geometry(2, 1, 80), [(33, 70)], torch.float32),  # several tiles of rows
    (geometry(4, 2, 40, window=1), [(200, 1), (3, 1)], torch.bfloat16),
    (geometry(17, 1, 16), [(140, 1), (1, 2)], torch.bfloat16),  # more than 16 queries a row
    (geometry(1, 1, 2), [(0, 200)], torch.float16),
    # The last rows of a tile see nothing of what the first ones do.
    (geometry(2, 1, 16, window=5), [(40, 60)], torch.float16),
]
LONG = [(0, 700), (3000, 1), (1500, 40), (17, 1), (9000, 1), (64, 64)]
LARGE = [
    (shape, sequences, dtype)
    for shape in (
        geometry(32, 32, 128),
        geometry(28, 4, 128),
        geometry(8, 2, 256, window=300),
        geometry(71, 1, 64),
        geometry(12, 12, 80, window=4096),
        geometry(6, 3, 18, window=5),
    )
    for sequences in (LONG, [(700, 1)] * 40)
    for dtype in DTYPES
]


def make_step(
    shape: AttentionGeometry,
    sequences: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """Like `Step.make`, on the device of the kernels, with positions for long contexts."""
    step = Step.make(shape, sequences, dtype, seed)
    longest = max(context + new for context, new in sequences)
    angles = torch.rand(longest, shape.head_dim // 2, generator=torch.Generator().manual_seed(seed))
    rows = Rows(*(getattr(step.rows, field.name).to(DEVICE) for field in fields(Rows)))
    return Step(
        rows,
        step.qkv.to(DEVICE),
        step.keys.mT.contiguous().to(DEVICE),  # as values lie
        step.values.to(DEVICE),
        (angles * 6.3).cos().to(DEVICE),
        (angles * 6.3).sin().to(DEVICE),
    )


def run_reference(shape: AttentionGeometry, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """As `Step.run`; the reference has a block's tokens side by side."""
    turned = replace(step, keys=step.keys.mT.contiguous())
    keys, values, result = turned.run(ReferenceAttention(shape))
    return keys.mT, values, result


def check(shape: AttentionGeometry, step: Step, tolerance: float | None = None) -> None:
    """The step's pages and result are those of the reference."""
    keys, values, result = step.run(GpuAttention(shape))
    slow_keys, slow_values, slow_result = run_reference(shape, step)
    if tolerance is None:
        tolerance = TOLERANCES[step.qkv.dtype]
    # Slots that hold nothing are NaN before and after.
    close: dict[str, Any] = {"atol": tolerance, "rtol": tolerance, "equal_nan": True}
    torch.testing.assert_close(keys, slow_keys, **close)
    assert torch.equal(values.nan_to_num(7), slow_values.nan_to_num(7))
    assert not result.isnan().any()
    torch.testing.assert_close(result, slow_result, **close)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels' tests run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_by_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=INTERPRETER_SECONDS,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@runs_kernels
@pytest.mark.parametrize(("shape", "sequences", "dtype"), LARGE if ON_GPU else SMALL)
def test_gpu_is_the_reference_only_faster(
    shape: AttentionGeometry, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    check(shape, make_step(shape, sequences, dtype))


@runs_kernels
def test_more_sequences_than_are_searched_at_once() -> None:
    shape = geometry(2, 1, 16)
    check(shape, make_step(shape, [(3, 1), (0, 2), (1, 1)] * 44))


@runs_kernels
def test_splits_grow_with_a_context_that_needs_more_than_there_are() -> None:
    shape = geometry(2, 1, 16)
    check(shape, make_step(shape, [(MAX_SPLITS * Parameters().min_split_tokens + 1, 1), (130, 1)]))


@runs_kernels
@pytest.mark.parametrize("window", [None, 150])
def test_few_rows_share_the_keys_of_a_long_context(window: int | None) -> None:
    # More splits than there may be; two tiles of rows; one that is not split beside it.
    shape = geometry(2, 1, 16, window)
    few = [(600, 35), (5, 3), (300, 1), (0, 40)]
    check(shape, make_step(shape, few))
    check(shape, make_step(shape, few[:1]))


@runs_kernels
def test_many_rows_are_enough_without_splits() -> None:
    shape = geometry(2, 1, 16)
    rows = Parameters().prompt_split_rows
    check(shape, make_step(shape, [(300, rows + 1), (300, 2)]))


@runs_kernels
def test_few_programs_do_the_work_of_many_sequences() -> None:
    shape = geometry(2, 2, 16)
    sequences = [(300, 1), (5, 1), (20, 2), (0, 1), (129, 1)]
    step = make_step(shape, sequences)
    check(shape, step)
    one = replace(Parameters(), decode_programs=1)
    together = step.run(GpuAttention(shape))[2]
    assert torch.equal(step.run(GpuAttention(shape, one))[2], together)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else [torch.float32], ids=str)
def test_a_sequence_does_not_notice_the_others(dtype: torch.dtype) -> None:
    shape = geometry(4, 2, 16)
    sequences = [(290, 1), (20, 40), (5, 1), (0, 30)]
    step = make_step(shape, sequences, dtype)
    _, _, together = step.run(GpuAttention(shape))
    for sequence in range(len(sequences)):
        alone, rows = step.alone(sequence)
        # In a step where it is alone, the tables are as wide as its own blocks at the least.
        width = -(-sum(sequences[sequence]) // 16)
        narrow = alone.rows.block_tables[:, :width].contiguous()
        for tables in (alone.rows.block_tables, narrow):
            shown = replace(alone, rows=replace(alone.rows, block_tables=tables))
            assert torch.equal(shown.run(GpuAttention(shape))[2], together[rows])


@runs_kernels
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_scores(size: float) -> None:
    shape = AttentionGeometry(heads=2, kv_heads=2, head_dim=16, scale=1.0)
    step = make_step(shape, [(90, 20), (150, 1)])
    step.qkv[:, : 2 * 16] *= size
    # Scores in the ten thousands are themselves known to some 0.01 only in float32.
    tolerance = 1e-4 if size < 100 else 0.1
    _, _, result = step.run(GpuAttention(shape))
    _, _, expected = run_reference(shape, step)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (3, 70), (2, 5)])
def test_add_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    residual, delta = torch.randn(2, rows, width).to(DEVICE, dtype)
    norm = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data.normal_()
    tolerance: dict[str, Any] = {"atol": 1e-6, "rtol": 4e-6 if dtype == torch.float32 else 2e-2}
    alone = add_rms_norm(residual.clone(), None, norm.weight.data, 1e-5)
    torch.testing.assert_close(alone, norm(residual).detach(), **tolerance)
    added = residual.clone()
    normalized = add_rms_norm(added, delta, norm.weight.data, 1e-5)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts off what a GPU rounds
        torch.testing.assert_close(added, residual + delta, atol=0, rtol=1e-2)
    else:
        assert torch.equal(added, residual + delta)
    torch.testing.assert_close(normalized, norm(added).detach(), **tolerance)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (3, 70), (2, 5)])
def test_silu_multiply(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    gate_up = (torch.randn(rows, 2 * width) * 10).to(DEVICE, dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -70.5])
    gate, up = gate_up.float().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    # A GPU's exp loses bits the farther from zero it is.
    tolerance: dict[str, Any] = {"atol": 1e-7, "rtol": 2e-5 if dtype == torch.float32 else 1e-2}
    torch.testing.assert_close(silu_multiply(gate_up), expected, **tolerance)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 96, 40), (3, 300, 17), (17, 64, 16), (70, 258, 33)]
)
def test_int8_product(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, inputs).to(DEVICE, dtype), torch.randn(outputs).to(DEVICE, dtype)
    weight = Int8Weight.of(torch.randn(outputs, inputs).to(DEVICE))
    exact = x.double() @ (weight.integers.double() * weight.scales[:, None].double()).T
    tolerance = TOLERANCES[dtype]
    for shift in (bias, None):
        result = int8_product(x, weight.integers, weight.scales, shift)
        expected = (exact if shift is None else exact + shift.double()).to(dtype)
        torch.testing.assert_close(result, expected, atol=tolerance * 10, rtol=tolerance)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group"),
    [(1, 256, 40, 128), (3, 300, 17, 128), (17, 72, 16, 32), (70, 64, 33, 64)],
)
def test_int4_product(dtype: torch.dtype, rows: int, inputs: int, outputs: int, group: int) -> None:
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, inputs).to(DEVICE, dtype), torch.randn(outputs).to(DEVICE, dtype)
    groups = -(-inputs // group)
    weight = Int4Weight(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=DEVICE),
        torch.rand(outputs, groups, device=DEVICE) / 4,
        torch.randint(0, 16, (outputs, groups), dtype=torch.uint8, device=DEVICE),
        group,
        dtype,
    )
    exact = x.double() @ weight.dequantized(torch.float64).T
    tolerance = TOLERANCES[dtype]
    for shift in (bias, None):
        result = GpuLinear(weight, shift)(x)
        expected = (exact if shift is None else exact + shift.double()).to(dtype)
        torch.testing.assert_close(result, expected, atol=tolerance * 10, rtol=tolerance)


@runs_kernels
@pytest.mark.parametrize(
    ("vocabulary", "limits"),
    [
        (50, {"top_k": 7}),
        (50, {"top_p": 0.6003}),
        (50, {"min_p": 0.05}),
        (1100, {"top_k": 40, "top_p": 0.9007, "min_p": 0.01}),  # several chunks of tokens
        (50, {"top_k": 1}),
        (50, {"top_p": 1e-6}),
        (50, {"temperature": 1e-300}),
        (1100, {"temperature": 5.0}),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_with_a_sort(vocabulary: int, limits: dict[str, Any]) -> None:
    # (No limit here falls between two tokens: float32 would choose the other one.)
    torch.manual_seed(vocabulary)
    # Rounded: of a model in a half type, many logits are equal.
    logits = (torch.randn(3, vocabulary) * 3).bfloat16().float()
    logits[1, ::3] = -torch.inf
    logits[2] = 1.5
    numbers = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numbers[0, 0] = 0.0
    for number in numbers.T.tolist():
        draws = [
            Draw(**({"temperature": 0.8, "top_k": 0, "top_p": 1.0} | limits), number=each)
            for each in number
        ]
        expected = next_tokens(logits, draws)
        largest, tokens = logits.to(DEVICE).max(-1)
        table = torch.from_numpy(gpu_draws(list(enumerate(draws))))
        draw_tokens(logits.to(DEVICE), largest, table.to(DEVICE), tokens)
        assert tokens.tolist() == expected.tolist()


@runs_kernels
def test_the_largest_number_draws_a_token_that_may_come() -> None:
    logits = torch.randn(1, 300) * 9
    logits[0, 7:] = -torch.inf
    largest, tokens = logits.to(DEVICE).max(-1)
    for top_k in (0, 5):
        table = torch.from_numpy(gpu_draws([(0, Draw(1.0, top_k, 1.0, 1.0 - 2.0**-53))]))
        draw_tokens(logits.to(DEVICE), largest, table.to(DEVICE), tokens)
        assert int(tokens[0]) < 7


@runs_kernels
def test_rows_that_are_not_drawn_stay_and_broken_ones_stay_inside() -> None:
    logits = torch.randn(3, 60)
    logits[1, 5] = torch.nan
    largest, tokens = logits.to(DEVICE).max(-1)
    before = tokens.tolist()
    table = torch.from_numpy(gpu_draws([(1, Draw(1.0, 5, 0.5, 0.3))]))
    draw_tokens(logits.to(DEVICE), largest, table.to(DEVICE), tokens)
    assert [tokens[0], tokens[2]] == [before[0], before[2]]
    assert 0 <= int(tokens[1]) < 60


@needs_gpu
@pytest.mark.parametrize("sequences", [[(900, 1), (40, 1)], [(900, 1), (40, 70)], [(0, 90)]])
def test_a_step_can_be_captured_in_a_cuda_graph(sequences: list[tuple[int, int]]) -> None:
    shape = geometry(8, 2, 64)
    step, other = (make_step(shape, sequences, torch.bfloat16, seed) for seed in (0, 1))
    attention = GpuAttention(shape)
    _, _, expected = other.run(attention)  # compiles the kernels, too

    def run() -> Tensor:
        parts = (step.qkv, step.cos, step.sin, step.keys, step.values, step.rows)
        attention.rotate_and_store(*parts)
        return attention.attend(step.qkv, step.keys, step.values, step.rows)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails where anything waits for the GPU
        result = run()
    for name in ("qkv", "keys", "values", "cos", "sin"):
        getattr(step, name).copy_(getattr(other, name))
    for field in fields(Rows):
        getattr(step.rows, field.name).copy_(getattr(other.rows, field.name))
    graph.replay()
    assert torch.equal(result, expected)


def test_no_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "attention_kernels", "row_kernels"):
        monkeypatch.delitem(sys.modules, f"{gpu.__name__}.{name}", raising=False)
        monkeypatch.delattr(gpu, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match="torch built for CUDA brings it along"):
        kernels_for(torch.device("cuda"))
