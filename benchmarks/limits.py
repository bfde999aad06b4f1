"""What the hardware allows: measured rates of memory and matrices, and what a model asks of them.

A decode step cannot be faster than reading the weights and the batch's keys and values once from
memory; a prefill cannot be faster than its matrix products at the rate of one large product.
`python -m benchmarks.limits` measures the rates in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llava_triton.device import default_device

SECONDS = 0.4
"""That each operation is repeated for; the fastest time counts."""
_LAUNCHES = 4
"""On a GPU, timed together: the events around one alone would be a noticeable part of it."""
_COLUMNS = 4096
_GPU_BUFFER_BYTES = 2 << 30
_UNKNOWN_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Limits:
    """Rates that were measured on one device, in one dtype; each is the best of many repeats."""

    device: str
    """Its name."""
    dtype: str
    """Of the matrices, as in `Settings.dtype`."""
    threads: int | None
    """torch's, on a CPU; None on a GPU."""
    read_bytes_per_second: float
    """A read-only stream of float32, by the fastest of a sum, a maximum and a product of a matrix
    and a vector; the bytes read are counted."""
    copy_bytes_per_second: float
    """A copy from one place of the device's memory to another; bytes read plus bytes written."""
    matrix_flops_per_second: float
    """One large square product in `dtype`, x W^T as a layer computes it; 2 n^3 for each."""
    host_copy_bytes_per_second: float | None
    """From pinned host memory to the GPU; None on a CPU."""
    to_host_bytes_per_second: float | None
    """From the GPU to pinned host memory; None on a CPU."""

    @property
    def memory_bytes_per_second(self) -> float:
        """The memory's limit: the faster of reading and copying.

        Decode reads nearly everything and writes nearly nothing, so reading is the truer limit.
        Which operation gets the most out of a memory differs from device to device, though, and
        none of them can exceed what the memory gives: the highest of them is the nearest to it.
        """
        return max(self.read_bytes_per_second, self.copy_bytes_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype, threads: int | None = None) -> Limits:
    """Measure them; takes 3 seconds, and on a CPU all of it.

    Args:
        device: where.
        dtype: of the matrix product.
        threads: on a CPU; None: as many as torch takes.
    """
    with _threads(threads), torch.inference_mode():
        read, copy = _memory_rates(device)
        matrix = _matrix_rate(device, dtype)
        to_device, to_host = _host_rates(device) if device.type == "cuda" else (None, None)
        return Limits(
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=None if device.type == "cuda" else torch.get_num_threads(),
            read_bytes_per_second=read,
            copy_bytes_per_second=copy,
            matrix_flops_per_second=matrix,
            host_copy_bytes_per_second=to_device,
            to_host_bytes_per_second=to_host,
        )


def best_of(measured: Sequence[Limits]) -> Limits:
    """The highest of every rate, of several measurements on one device in one dtype."""
    return replace(
        measured[0],
        **{
            name: max(getattr(each, name) for each in measured)
            for name, rate in asdict(measured[0]).items()
            if name.endswith("_per_second") and rate is not None
        },
    )


def device_name(device: torch.device) -> str:
    """What people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Of one run, after two that are not counted."""
    run(), run()
    fastest = float("inf")
    ends_at = time.perf_counter() + SECONDS
    while time.perf_counter() < ends_at:
        fastest = min(fastest, _gpu_seconds(run) if device.type == "cuda" else seconds_of(run))
    return fastest


def seconds_of(run: Callable[[], object]) -> float:
    """Of one run on the CPU."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _gpu_seconds(run: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(_LAUNCHES):
        run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000.0 / _LAUNCHES


def _memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second read, and copied."""
    if device.type == "cuda":
        size = min(_GPU_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    else:
        size = 4 * cache_bytes()
    source = torch.ones(size // 4 // _COLUMNS, _COLUMNS, device=device)
    size = source.numel() * source.element_size()
    target, vector = torch.empty_like(source), torch.ones(_COLUMNS, device=device)
    reads = (source.sum, source.amax, lambda: source.mv(vector))
    read = min(fastest_seconds(device, run) for run in reads)
    copy = fastest_seconds(device, lambda: target.copy_(source))
    return size / read, 2 * size / copy


def cache_bytes() -> int:
    """The CPU's last-level cache."""
    sizes = [
        int(text.removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := file.read_text().strip()).endswith("K")
    ]
    return max(sizes, default=_UNKNOWN_CACHE_BYTES)


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second."""
    size = 8192 if device.type == "cuda" else 1536
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products: list[Callable[[], Tensor]] = [lambda: functional.linear(x, weight)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # On some CPUs the packed layout is twice as fast as the plain one.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return 2 * size**3 / min(fastest_seconds(device, run) for run in products)


def _host_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second to the device, and from it."""
    size = 256 << 20
    host = torch.ones(size, dtype=torch.uint8).pin_memory()
    there = torch.ones(size, dtype=torch.uint8, device=device)
    to_device = fastest_seconds(device, lambda: there.copy_(host, non_blocking=True))
    to_host = fastest_seconds(device, lambda: host.copy_(there, non_blocking=True))
    return size / to_device, size / to_host


# What a model asks for. `config` is transformers' configuration of a Llama, Mistral or Qwen2.


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def layer_weights(config: Any) -> int:
    """Values in all layers' matrices: everything that each token is multiplied by but the last."""
    width, heads = config.hidden_size, config.num_attention_heads
    attention = width * _head_dim(config) * 2 * (heads + config.num_key_value_heads)
    return int(config.num_hidden_layers * (attention + 3 * width * config.intermediate_size))


def head_weights(config: Any) -> int:
    """Values in the last matrix, which makes logits."""
    return int(config.vocab_size * config.hidden_size)


def weight_bytes(config: Any, bytes_per_weight: float) -> float:
    """Read once a decode step, whatever the batch: all matrices of the layers and the last one.

    The rest is left out, being small: of the embedding table a row a token, the norms, biases.
    """
    return (layer_weights(config) + head_weights(config)) * bytes_per_weight


def kv_bytes_per_token(config: Any, bytes_per_value: float) -> float:
    """Keys and values of one token, in all layers."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config)
    return float(values * bytes_per_value)


def decode_step_bytes(
    config: Any,
    contexts: Sequence[float],
    *,
    bytes_per_weight: float = 2,
    bytes_per_value: float = 2,
) -> float:
    """Read at least in one step: the weights once, and every sequence's keys and values once.

    Args:
        config: of the text model.
        contexts: tokens that each sequence of the batch attends to.
        bytes_per_weight: 2 for half types.
        bytes_per_value: of a key or value.
    """
    kept = kv_bytes_per_token(config, bytes_per_value) * sum(contexts)
    return weight_bytes(config, bytes_per_weight) + kept


def prefill_flops(config: Any, new_tokens: int, context: int = 0) -> float:
    """Of the products for a prompt: 2 a weight and token, causal attention, one row of logits.

    Args:
        config: of the text model.
        new_tokens: tokens to compute.
        context: tokens before them, whose keys and values are there already.
    """
    pairs = new_tokens * context + new_tokens * (new_tokens + 1) / 2
    # A product of query and key, and one of weight and value, for each pair: 2 FLOP a dimension.
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * _head_dim(config)
    matrices = 2 * layer_weights(config) * new_tokens + 2 * head_weights(config)
    return float(matrices + attention * pairs)


def vision_flops(config: Any) -> float:
    """Of the products for one picture: the tower as far as its features are used, and the
    projector.

    Args:
        config: of the whole LLaVA, with a CLIP tower.
    """
    vision = config.vision_config
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    tokens = patches + 1  # the class token
    used = config.vision_feature_layer
    used = [used] if isinstance(used, int) else list(used)
    # Of the n + 1 hidden states, the first is what goes into the first layer.
    depth = max(each if each >= 0 else vision.num_hidden_layers + 1 + each for each in used)
    embedding = patches * vision.num_channels * vision.patch_size**2 * width
    layer = tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * tokens**2 * width
    projected = patches if config.vision_feature_select_strategy == "default" else tokens
    text_width = config.text_config.hidden_size
    projector = projected * (len(used) * width * text_width + text_width**2)
    return float(2 * (embedding + depth * layer + projector))


def main() -> int:
    """Measure the limits on the default device and write them as JSON, one for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    measured = [
        asdict(measure_limits(default_device(), getattr(torch, dtype)))
        for dtype in options.dtypes or ["float32"]
    ]
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


def read_limits(path: Path) -> dict[str, Limits]:
    """What the command wrote, by dtype."""
    return {values["dtype"]: Limits(**values) for values in json.loads(path.read_text())}


if __name__ == "__main__":
    sys.exit(main())
