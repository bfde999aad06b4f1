"""The GPU kernels as they are launched, compiled for a GPU that is not here; as JSON.

    python -m tests.compiled_kernels 86

A driver of our own stands in for CUDA's: Triton compiles what is launched, checks its shared memory
against the GPU's, and launches nothing. A process a capability, because Triton asks for it once.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from llava_triton.kernels.base import AttentionGeometry, Rows

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""What a program may have at most, by compute capability (CUDA's programming guide: 163, 99, 99 and
227 KiB)."""
MULTIPROCESSORS = {80: 108, 86: 80, 89: 58, 90: 132}
"""Of an A100, an A10G, an L4 and an H100."""
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes of a multiprocessor."""

    name: str
    shared: int
    """Bytes."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread in the GPU's memory: above 0 where registers are spilled."""


class _Utils:
    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.compiled: list[Compiled] = []

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES[self._capability],
            "multiprocessor_count": MULTIPROCESSORS[self._capability],
            "warpSize": 32,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, _: int
    ) -> tuple[int, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [str(_TOOL), "-res-usage", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
        assert found is not None, done.stdout + done.stderr
        self.compiled.append(Compiled(name, shared, int(found[1]), int(found[2])))
        return 1, 1, int(found[1]), 0, 1024


class StandIn(DriverBase):  # type: ignore[misc]
    """In place of Triton's driver for CUDA.

    Args:
        capability: 80, 86, 89 or 90.
    """

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = _Utils(capability)
        self.launched: Counter[str] = Counter()
        launched = self.launched

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self._name = source.fn.__name__

            def __call__(self, *_: Any) -> None:
                launched[self._name] += 1

        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return None

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> Any:
        return None

    def clear_cache(self, _: Any) -> None:
        pass


def installed(capability: int) -> StandIn:
    """The stand-in, in place of the driver for the rest of this process."""
    driver = StandIn(capability)
    triton.runtime.driver.set_active(driver)
    torch.cuda.device_of = lambda _: contextlib.nullcontext()  # type: ignore
    return driver


GEOMETRIES = {
    "llava-1.5-7b": AttentionGeometry(32, 32, 128, 128**-0.5),
    "llava-1.6-mistral-7b": AttentionGeometry(32, 8, 128, 128**-0.5),
    "onevision-qwen2-7b": AttentionGeometry(28, 4, 128, 128**-0.5),
}
STEPS = {
    "decode": [(1000, 1)] * 4,
    "question": [(1000, 45)],
    "mixed": [(1000, 1), (0, 300)],
}
"""Sequences of (tokens in the pages, new tokens)."""


def attention_step(
    geometry: AttentionGeometry, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows]:
    """Queries with keys and values, cosines, pages of keys, of values, rows: nothing in them."""
    new = torch.tensor([count for _, count in sequences])
    contexts = torch.tensor([context for context, _ in sequences], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
    total = int(new.sum())
    pages = torch.zeros(1, geometry.kv_heads, 16, geometry.head_dim, dtype=dtype)
    tables = torch.zeros(len(sequences), 128, dtype=torch.int32)
    rows = Rows(starts, contexts, tables, torch.zeros(total, dtype=torch.int64))
    qkv = torch.zeros(total, geometry.qkv_width, dtype=dtype)
    return qkv, torch.zeros(16, geometry.head_dim // 2), pages, pages.clone(), rows


def launch_everything(capability: int) -> None:
    """Every kernel, in the shapes of the models that are served; those of benchmarks, too."""
    from benchmarks.gpu_check.candidates import few_row_product, nothing
    from llava_triton.kernels.gpu.attention import (
        GpuAttention,
        add_rms_norm,
        int8_product,
        silu_multiply,
    )
    from llava_triton.kernels.gpu.linear import PackedInt4, int4_product
    from llava_triton.kernels.gpu.sampling import draw_tokens

    # float32 is for one capability only: it takes no tensor cores, whose tiles differ.
    dtypes = (torch.bfloat16, torch.float32)[: 2 if capability == 86 else 1]
    for name, geometry in GEOMETRIES.items():
        for dtype in dtypes[: 2 if name == "llava-1.5-7b" else 1]:
            attention = GpuAttention(geometry)
            for sequences in STEPS.values():
                qkv, angles, keys, values, rows = attention_step(geometry, sequences, dtype)
                attention.rotate_and_store(qkv, angles, angles, keys, values, rows)
                attention.attend(qkv, keys, values, rows)
    for dtype in dtypes:
        for rows_of_x in (1, 20, 64, 256, 300):
            x = torch.zeros(rows_of_x, 4096, dtype=dtype)
            weight = torch.zeros(64, 4096, dtype=torch.int8)
            int8_product(x, weight, torch.zeros(64), None)
            if dtype == torch.bfloat16:
                nibbles = weight.view(torch.uint8).view(64, 32, 128)[..., :64].contiguous()
                scales = torch.zeros(32, 64)
                int4_product(x, PackedInt4(nibbles, scales, scales.to(torch.uint8)), None)
    logits = torch.zeros(2, 32064)
    draw_tokens(logits, logits[:, 0].clone(), torch.zeros(1, 6), torch.zeros(2).long())
    for dependent in (False, True)[: 2 if capability >= 90 else 1]:
        nothing(torch.zeros(1), dependent=dependent)
        for rows_of_x in (1, 8):
            x = torch.zeros(rows_of_x, 4096, dtype=torch.bfloat16)
            few_row_product(x, torch.zeros(64, 4096, dtype=torch.bfloat16), dependent=dependent)
    x = torch.zeros(2, 4096, dtype=torch.bfloat16)
    add_rms_norm(x, x, x[0].clone(), 1e-5)
    silu_multiply(torch.zeros(2, 22016, dtype=torch.bfloat16))


def launches_of_a_step(rows: int) -> dict[str, int]:
    """Launches of a decode step of two layers and of one, the products with weights among them.

    Args:
        rows: sequences.
    """
    from llava_triton.kernels import kernels_for
    from llava_triton.kernels.layers import Layer, Stack

    driver = triton.runtime.driver.active
    geometry = AttentionGeometry(4, 4, 16, 0.25)
    width, inner = 64, 128
    kernels = kernels_for(torch.device("cuda"))
    linear = functional.linear

    def counted(*given: Any) -> Tensor:
        driver.launched["linear"] += 1
        return linear(*given)

    functional.linear = counted  # type: ignore[assignment]

    def product(outputs: int, inputs: int) -> Any:
        return kernels.make_linear(torch.zeros(outputs, inputs), None)

    layer = Layer(
        torch.ones(width),
        product(geometry.qkv_width, width),
        kernels.attention(geometry, None),
        product(width, 64),
        torch.ones(width),
        product(2 * inner, width),
        product(width, inner),
    )
    told = {}
    for layers in (1, 2):
        qkv, angles, keys, values, of_step = attention_step(
            geometry, [(1000, 1)] * rows, torch.float32
        )
        stack = Stack([layer] * layers, torch.ones(width), 1e-5, angles, angles)
        driver.launched.clear()
        kernels.join(stack)(
            torch.zeros(len(qkv), width),
            torch.stack([keys] * layers),
            torch.stack([values] * layers),
            of_step,
        )
        told[f"layers_{layers}"] = sum(driver.launched.values())
    functional.linear = linear
    return told


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    capability = int(sys.argv[1])
    driver = installed(capability)
    with torch.inference_mode():
        launch_everything(capability)
        compiled = [asdict(each) for each in driver.utils.compiled]
        told = launches_of_a_step(4)
    json.dump({"kernels": compiled, "launches": told}, sys.stdout)


if __name__ == "__main__":
    main()
