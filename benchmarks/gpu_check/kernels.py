"""A stage of `make gpu-check`: each kind of kernel by itself, and the best of its parameters.

It needs no checkpoint. The parameters that were found so far lie in a file at every moment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_check.stage import PARAMETERS, Options, run_stage
from benchmarks.gpu_check.timing import copies_beyond_the_cache, seconds_each
from llava_triton.kernels.base import BLOCK_TOKENS, AttentionGeometry, Rows
from llava_triton.kernels.gpu.parameters import Parameters
from llava_triton.kernels.int8 import Int8Weight

NODES = 300
"""Of a graph of empty kernels."""
DECODE_FIELDS: dict[str, tuple[int, ...]] = {
    "min_split_tokens": (64, 128, 256, 512),
    "decode_stages": (3, 5, 7),
    "decode_programs": (4, 8, 16, 32),
}
PROMPT_FIELDS: dict[str, tuple[int, ...]] = {"prompt_splits": (1, 2, 4, 8)}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    geometry: AttentionGeometry
    width: int
    inner: int
    vocabulary: int
    rows: tuple[int, ...]
    """Of products."""
    sessions: tuple[int, ...]
    """At once, in decoding."""
    contexts: tuple[int, ...]
    """Tokens of each."""
    prompts: tuple[tuple[int, int], ...]
    """(tokens in the pages, new tokens)."""


SEVEN_BILLION = Sizes(
    AttentionGeometry(32, 32, 128, 128**-0.5),
    4096,
    11008,
    32064,
    (1, 2, 4, 8, 16, 45, 64, 650),
    (1, 64, 256),
    (1000, 4000),
    ((1000, 45), (4000, 45), (1000, 200), (0, 650)),
)
TINY = Sizes(AttentionGeometry(1, 1, 16, 0.25), 16, 16, 16, (1,), (2,), (20,), ((20, 3),))


class KernelTimes:
    """The parts of the stage.

    Args:
        options: of the stage.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._device, self._dtype = options.place.device, options.place.dtype
        on_gpu = self._device.type == "cuda"
        self._sizes = SEVEN_BILLION if on_gpu else TINY
        self._fields = (DECODE_FIELDS, PROMPT_FIELDS)
        if not on_gpu:  # one other value each: it takes the same way
            self._fields = {"min_split_tokens": (64, 128)}, {"prompt_splits": (2, 4)}
        self._chosen = Parameters()
        self._save()

    def empty_nodes(self) -> None:
        """What a node of a CUDA graph costs by itself."""
        from benchmarks.gpu_check.candidates import nothing

        out = torch.zeros(1, device=self._device)
        ways = {"plain": False}
        if self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (9, 0):
            ways["dependent"] = True
        nodes = NODES if self._device.type == "cuda" else 2
        for name, dependent in ways.items():
            run = partial(nothing, out, dependent=dependent)
            took = seconds_each([run] * nodes, self._device) * 1e6
            self._add(f"node_{name}_us", took, f"an empty node, {name} launch: {took:.2f} us")
        if "dependent" not in ways:
            why = "dependent launches need compute capability 9.0"
            self._options.findings.leave_out("node_dependent_us", why)

    def products(self) -> None:
        """The library's and ours, at every number of rows."""
        sizes, geometry = self._sizes, self._sizes.geometry
        shapes = {
            "qkv": (geometry.qkv_width, sizes.width),
            "output": (sizes.width, geometry.heads * geometry.head_dim),
            "gate_up": (2 * sizes.inner, sizes.width),
            "down": (sizes.width, sizes.inner),
            "head": (sizes.vocabulary, sizes.width),
        }
        for name, shape in shapes.items():
            self._options.findings.attempt(f"product {name}", partial(self._product, name, *shape))

    def _product(self, name: str, outputs: int, inputs: int) -> None:
        from benchmarks.gpu_check.candidates import FEW_ROWS, few_row_product
        from llava_triton.kernels.gpu.attention import int8_product

        size = outputs * inputs * self._dtype.itemsize
        count = copies_beyond_the_cache(size, self._device, least=2, most=12)
        weights = [self._random(outputs, inputs) for _ in range(count)]
        rounded = [Int8Weight.of(each) for each in weights]
        dependent = bool(
            self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (9, 0)
        )
        for rows in self._sizes.rows:
            x = self._random(rows, inputs)
            ways: dict[str, list[Callable[[], Any]]] = {
                "library": [partial(functional.linear, x, each) for each in weights],
                "int8": [
                    partial(int8_product, x, each.integers, each.scales, None) for each in rounded
                ],
            }
            if rows <= FEW_ROWS:
                ways["few rows"] = [
                    partial(few_row_product, x, each, dependent=dependent) for each in weights
                ]
            took = {way: seconds_each(runs, self._device) * 1e6 for way, runs in ways.items()}
            told = ", ".join(f"{way} {each:.1f} us" for way, each in took.items())
            rate = size / took["library"] / 1e3
            told = f"{name}, {rows} rows: {told}; the library reads {rate:.0f} GB/s"
            self._add(f"product_{name}_{rows}", took, told)

    def decode_attention(self) -> None:
        """Every number of sessions with every context, over the parameters of decoding."""
        cases = [
            (f"{sessions} x {context}", [(context - 1, 1)] * sessions)
            for sessions in self._sizes.sessions
            for context in self._sizes.contexts
        ]
        self._choose("decode", cases, self._fields[0])

    def prompt_attention(self) -> None:
        """Questions and openings, over the parameters of prompts."""
        cases = [
            (f"{new} behind {context}", [(context, new)]) for context, new in self._sizes.prompts
        ]
        self._choose("prompt", cases, self._fields[1])

    def _choose(
        self,
        kind: str,
        cases: list[tuple[str, list[tuple[int, int]]]],
        choices: dict[str, tuple[int, ...]],
    ) -> None:
        """One parameter after the other, the best so far kept."""
        best = self._measure(kind, cases, self._chosen)
        for name, values in choices.items():
            for value in values:
                tried = replace(self._chosen, **{name: value})
                if tried == self._chosen:
                    continue
                took = self._measure(kind, cases, tried)
                both = took.keys() & best.keys()
                # Of all cases alike: a mean of ratios.
                if both and sum(took[case] / best[case] for case in both) < 0.99 * len(both):
                    self._chosen, best = tried, took
                    self._save()
        told = ", ".join(f"{name} {value}" for name, value in asdict(self._chosen).items())
        self._add(f"{kind}_parameters", asdict(self._chosen), f"best so far: {told}")

    def _measure(
        self, kind: str, cases: list[tuple[str, list[tuple[int, int]]]], chosen: Parameters
    ) -> dict[str, float]:
        """Microseconds of a layer's attention, by case; one that fails has none."""
        took = {}
        for name, sequences in cases:
            try:
                took[name] = self._attention(sequences, chosen) * 1e6
            except Exception as error:  # too little memory, or parameters that do not fit
                print(f"  {kind} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        own = {name: getattr(chosen, name) for name in [*self._fields[0], *self._fields[1]]}
        told = ", ".join(f"{name}: {each:.1f}" for name, each in took.items())
        key = f"{kind}_" + "_".join(str(value) for value in own.values())
        self._add(key, {"parameters": own, "us": took}, f"{kind} attention {own}: {told} us")
        return took

    def _attention(self, sequences: list[tuple[int, int]], chosen: Parameters) -> float:
        from llava_triton.kernels.gpu.attention import GpuAttention

        geometry, device = self._sizes.geometry, self._device
        needed = [-(-(context + new) // BLOCK_TOKENS) for context, new in sequences]
        blocks = sum(needed)
        page = geometry.kv_heads * BLOCK_TOKENS * geometry.head_dim
        copies = copies_beyond_the_cache(
            2 * blocks * page * self._dtype.itemsize, self._device, most=16
        )
        shape = (copies, blocks, geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
        keys, values = self._random(*shape), self._random(*shape)
        new = torch.tensor([count for _, count in sequences])
        places = torch.randperm(blocks).int()
        tables = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
        for table, own in zip(tables, places.split(needed), strict=True):
            table[: len(own)] = own
        rows = Rows(
            torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int().to(device),
            torch.tensor([context for context, _ in sequences], dtype=torch.int32, device=device),
            tables.to(device),
            torch.cat([torch.arange(c, c + n) for c, n in sequences]).to(device),
        )
        qkv = self._random(int(new.sum()), geometry.qkv_width)
        attention = GpuAttention(geometry, chosen)
        runs = [
            partial(attention.attend, qkv, *pages, rows) for pages in zip(keys, values, strict=True)
        ]
        return seconds_each(runs, device)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def _add(self, name: str, value: Any, told: str) -> None:
        self._options.findings.add(name, value, told)

    def _save(self) -> None:
        """In one go, as findings are."""
        file = self._options.folder / PARAMETERS
        new = file.with_suffix(".new")
        new.write_text(json.dumps(asdict(self._chosen), indent=1) + "\n")
        new.replace(file)


def measure(options: Options) -> None:
    """The stage."""
    times = KernelTimes(options)
    for part in (
        times.empty_nodes,
        times.decode_attention,
        times.prompt_attention,
        times.products,
    ):
        options.findings.attempt(part.__name__, part)
        if options.place.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if "--cpu" in sys.argv:  # before Triton is imported: its interpreter takes the kernels' place
        os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(run_stage(__doc__, measure))
