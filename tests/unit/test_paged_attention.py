"""Paged attention: the reference against torch and transformers, the CPU kernels against it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from llava_triton.kernels.base import (
    BLOCK_TOKENS,
    AttentionGeometry,
    PagedAttention,
    Rows,
)
from llava_triton.kernels.cpu import build as cpu_build
from llava_triton.kernels.cpu.attention import CpuAttention, add_rms_norm, silu_multiply
from llava_triton.kernels.reference import ReferenceAttention
from tests.properties import given, settings

POSITIONS = 1024
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)


@dataclass
class Step:
    """One step of a ragged batch; pages that hold the contexts, and NaN wherever nothing is."""

    rows: Rows
    qkv: Tensor
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor

    @staticmethod
    def make(
        geometry: AttentionGeometry,
        sequences: list[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        shared_blocks: int = 0,
    ) -> Step:
        """Sequences of (context, new tokens), their blocks shuffled over the pages.

        All begin with the same `shared_blocks` blocks, as far as their contexts fill those.
        """
        random = torch.Generator().manual_seed(seed)
        kv_heads, head_dim = geometry.kv_heads, geometry.head_dim
        needed = [-(-(context + new) // BLOCK_TOKENS) for context, new in sequences]
        blocks = sum(needed) + shared_blocks + 2
        free = torch.randperm(blocks, generator=random).tolist()
        shared = [free.pop() for _ in range(shared_blocks)]
        # Past the end of a sequence's blocks, the tables hold what would crash or poison.
        tables = torch.full((len(sequences), max(needed) + 2), 2**31 - 1, dtype=torch.int32)
        keys = torch.full((blocks, kv_heads, head_dim, BLOCK_TOKENS), torch.nan, dtype=dtype)
        values = torch.full((blocks, kv_heads, BLOCK_TOKENS, head_dim), torch.nan, dtype=dtype)
        for sequence, (context, _) in enumerate(sequences):
            own = shared[: context // BLOCK_TOKENS]
            own += [free.pop() for _ in range(needed[sequence] - len(own))]
            tables[sequence, : len(own)] = torch.tensor(own)
            for begin in range(0, context, BLOCK_TOKENS):
                block, slots = own[begin // BLOCK_TOKENS], min(BLOCK_TOKENS, context - begin)
                if values[block, 0, 0, 0].isnan():
                    drawn = torch.randn(2, kv_heads, slots, head_dim, generator=random).to(dtype)
                    keys[block, :, :, :slots], values[block, :, :slots] = drawn[0].mT, drawn[1]
        contexts = torch.tensor([context for context, _ in sequences])
        new = torch.tensor([new for _, new in sequences])
        positions = torch.cat([torch.arange(c, c + n) for c, n in sequences])
        angles = torch.rand(POSITIONS, head_dim // 2, generator=random) * 6.3
        return Step(
            Rows(
                torch.cat([torch.zeros(1), new.cumsum(0)]).int(), contexts.int(), tables, positions
            ),
            torch.randn(len(positions), geometry.qkv_width, generator=random).to(dtype),
            keys,
            values,
            angles.cos(),
            angles.sin(),
        )

    def run(self, attention: PagedAttention) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and result of the whole step, done on copies."""
        qkv, keys, values = self.qkv.clone(), self.keys.clone(), self.values.clone()
        attention.rotate_and_store(qkv, self.cos, self.sin, keys, values, self.rows)
        return keys, values, attention.attend(qkv, keys, values, self.rows)

    def alone(self, sequence: int) -> tuple[Step, slice]:
        """The step of one of the sequences by itself, and its rows in this step."""
        first, end = self.rows.starts[sequence : sequence + 2].tolist()
        rows = Rows(
            torch.tensor([0, end - first], dtype=torch.int32),
            self.rows.contexts[sequence : sequence + 1].clone(),
            self.rows.block_tables[sequence : sequence + 1].clone(),
            self.rows.positions[first:end].clone(),
        )
        return replace(self, rows=rows, qkv=self.qkv[first:end].clone()), slice(first, end)


@st.composite
def geometries(draw: st.DrawFn) -> AttentionGeometry:
    """Multi-head, grouped and multi-query attention, with and without a window."""
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 71 if kv_heads == 1 else 12]))
    head_dim = draw(st.sampled_from([8, 16, 18, 40, 64, 80, 128, 256]))
    window = draw(st.none() | st.integers(1, 130))
    return AttentionGeometry(kv_heads * group, kv_heads, head_dim, head_dim**-0.5, window)


sequence_lists = st.lists(
    st.tuples(
        st.integers(0, 40) | st.integers(0, 200), st.just(1) | st.integers(1, 20) | st.just(70)
    ),
    min_size=1,
    max_size=4,
)


def contiguous(step: Step, geometry: AttentionGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step of one sequence, rotated by transformers: queries [1, H, N, D], keys and values
    [1, G, M, D], the context's ahead of the new ones."""
    tokens = step.qkv.view(1, len(step.qkv), -1, geometry.head_dim).transpose(1, 2)
    queries, keys, values = tokens.split([geometry.heads, geometry.kv_heads, geometry.kv_heads], 1)
    cos, sin = (
        table[step.rows.positions].repeat(1, 2)[None].to(step.qkv.dtype)
        for table in (step.cos, step.sin)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    context = int(step.rows.contexts[0])
    blocks = step.rows.block_tables[0, : -(-context // BLOCK_TOKENS)].long()
    old_keys = torch.cat([*step.keys[blocks]], -1).mT if len(blocks) else keys[0, :, :0]
    old_values = torch.cat([*step.values[blocks]], -2) if len(blocks) else values[0, :, :0]
    return (
        queries,
        torch.cat([old_keys[:, :context], keys[0]], 1)[None],
        torch.cat([old_values[:, :context], values[0]], 1)[None],
    )


def seen(geometry: AttentionGeometry, positions: Tensor, tokens: int) -> Tensor:
    """Which of the keys each query sees: bool [N, M]."""
    return torch.tensor(
        [
            [p - (geometry.window or POSITIONS) < key <= p for key in range(tokens)]
            for p in positions.tolist()
        ]
    )


@settings(max_examples=30)
@given(geometries(), st.integers(0, 100), st.integers(1, 40))
def test_reference_is_what_torch_and_transformers_compute(
    geometry: AttentionGeometry, context: int, new: int
) -> None:
    step = Step.make(geometry, [(context, new)])
    _, _, result = step.run(ReferenceAttention(geometry))
    queries, keys, values = contiguous(step, geometry)
    mask = seen(geometry, step.rows.positions, context + new)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=geometry.scale, enable_gqa=True
    )
    torch.testing.assert_close(result, sdpa[0].transpose(0, 1).flatten(1), atol=2e-5, rtol=2e-5)

    module: Any = torch.nn.Module()
    module.num_key_value_groups = geometry.heads // geometry.kv_heads
    added_mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
    eager, _ = eager_attention_forward(
        module.eval(), queries, keys, values, added_mask, scaling=geometry.scale
    )
    torch.testing.assert_close(result, eager[0].flatten(1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=35)
@given(geometries(), sequence_lists, st.integers(0, 3), st.integers(0, 2**31))
def test_cpu_is_the_reference_only_faster(
    dtype: torch.dtype,
    geometry: AttentionGeometry,
    sequences: list[tuple[int, int]],
    shared_blocks: int,
    seed: int,
) -> None:
    step = Step.make(geometry, sequences, dtype, seed, shared_blocks)
    keys, values, result = step.run(CpuAttention(geometry))
    slow_keys, slow_values, slow_result = step.run(ReferenceAttention(geometry))
    tolerance = TOLERANCES[dtype]
    # Slots that hold nothing are NaN before and after.
    close: dict[str, Any] = {"atol": tolerance, "rtol": tolerance, "equal_nan": True}
    torch.testing.assert_close(keys, slow_keys, **close)
    assert torch.equal(values.nan_to_num(7), slow_values.nan_to_num(7))
    assert not result.isnan().any()
    torch.testing.assert_close(result, slow_result, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_prompts_and_contexts(dtype: torch.dtype) -> None:
    geometry = AttentionGeometry(heads=8, kv_heads=2, head_dim=64, scale=0.125)
    step = Step.make(geometry, [(0, 300), (700, 1), (500, 333)], dtype)
    _, _, result = step.run(CpuAttention(geometry))
    _, _, expected = step.run(ReferenceAttention(geometry))
    torch.testing.assert_close(result, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(geometries(), sequence_lists, st.integers(1, 2))
def test_a_sequence_does_not_notice_the_others(
    dtype: torch.dtype, geometry: AttentionGeometry, sequences: list[tuple[int, int]], threads: int
) -> None:
    attention = CpuAttention(geometry)
    step = Step.make(geometry, sequences, dtype)
    _, _, together = step.run(attention)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for sequence in range(len(sequences)):
            alone, rows = step.alone(sequence)
            assert torch.equal(alone.run(attention)[2], together[rows])
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_scores(size: float) -> None:
    geometry = AttentionGeometry(heads=2, kv_heads=2, head_dim=16, scale=1.0)
    step = Step.make(geometry, [(90, 20)])
    step.qkv[:, : 2 * 16] *= size
    _, _, result = step.run(CpuAttention(geometry))
    # Scores in the ten thousands are themselves known to some 0.01 only in float32.
    tolerance = 1e-4 if size < 100 else 0.1
    _, _, expected = step.run(ReferenceAttention(geometry))
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (3, 70), (40, 768), (2, 5)])
def test_add_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    residual, delta = torch.randn(2, rows, width).to(dtype)
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    tolerance: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-2 if dtype == torch.bfloat16 else 2e-6}
    alone = add_rms_norm(residual.clone(), None, norm.weight.data, 1e-5)
    torch.testing.assert_close(alone, norm(residual).detach(), **tolerance)
    added = residual.clone()
    normalized = add_rms_norm(added, delta, norm.weight.data, 1e-5)
    assert torch.equal(added, residual + delta)
    torch.testing.assert_close(normalized, norm(residual + delta).detach(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (3, 70), (40, 2048), (2, 5)])
def test_silu_multiply(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    gate_up = (torch.randn(rows, 2 * width) * 10).to(dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.5])
    gate, up = gate_up.chunk(2, dim=-1)
    tolerance: dict[str, Any] = {"atol": 1e-30, "rtol": 1e-2 if dtype == torch.bfloat16 else 2e-6}
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(silu_multiply(gate_up), expected, **tolerance)


def test_nan_and_infinity_stay_visible() -> None:
    gate_up = torch.tensor([[torch.nan, torch.inf, 1.0, 1.0, 1.0, torch.nan]])
    for dtype in DTYPES:
        result = silu_multiply(gate_up.to(dtype)).float()
        assert result[0].isnan().tolist() == [True, False, True]
        assert result[0, 1] == torch.inf


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cpu_build.KernelBuildError, match=r"apt-get install g\+\+"):
        cpu_build.load_kernels()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpu_build.KernelBuildError, match="no-such-compiler"):
        cpu_build.load_kernels()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal: no headers" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(cpu_build.KernelBuildError, match="no headers"):
        cpu_build.load_kernels()
    assert not list((tmp_path / "cache" / "llava-triton").iterdir())


def test_a_build_is_kept_for_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_build.load_kernels()
    (library,) = (tmp_path / "llava-triton").iterdir()
    built = library.stat().st_mtime_ns
    # The next process may not compile, and finds the library of threads that torch uses.
    code = (
        "from llava_triton.kernels.cpu import build as cpu_build\n"
        "cpu_build._compile = None\n"
        "cpu_build.load_kernels()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "assert len({word for word in maps if 'libgomp' in word}) == 1\n"
    )
    package = Path(cpu_build.__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(package)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
    assert [library] == list((tmp_path / "llava-triton").iterdir())
    assert library.stat().st_mtime_ns == built


def test_an_unusable_cache_is_replaced_by_a_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = Path(cpu_build.load_kernels()._name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    with patch.object(cpu_build, "_compile", lambda _, library: shutil.copy(built, library)):
        used = Path(cpu_build.load_kernels()._name)
    assert used.is_relative_to(tmp_path / "temporary")
    assert used.name == built.name
