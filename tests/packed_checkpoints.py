"""Checkpoints with 4-bit weights, written as the published tools write them, by loops as plain as
their descriptions; and the same with what those weights are as floats.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_triton.checkpoint.weights import canonical_name

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs of a word of AutoAWQ's `WQLinear_GEMM`, four bits after another."""


def word(values: Tensor) -> Tensor:
    """Eight integers of 4 bits [8, ...] to one of 32, the first in the lowest bits."""
    total = torch.zeros(values.shape[1:], dtype=torch.int64)
    for place, value in enumerate(values.long()):
        total += value << (4 * place)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def rounded(
    weight: Tensor, group: int, *, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers 0 to 15 [outputs, inputs]; scales, in `dtype`, and zero points [outputs, groups]."""
    grouped = weight.view(len(weight), -1, group)
    if symmetric:
        scales = grouped.abs().amax(2) / 7.5
        zeros = torch.full(scales.shape, 8)
    else:
        least = grouped.amin(2).clamp_max(0.0)
        scales = (grouped.amax(2).clamp_min(0.0) - least) / 15
        zeros = (-least / scales).round().long()
    scales = scales.to(dtype)
    integers = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return integers.flatten(1).long(), scales, zeros


def awq(integers: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """As AutoAWQ: rows are inputs, or groups of them."""

    def words(matrix: Tensor) -> Tensor:
        columns = range(0, matrix.shape[1], 8)
        order = torch.tensor(AWQ_ORDER)
        return torch.stack([word(matrix[:, first + order].T) for first in columns], 1)

    return {
        "qweight": words(integers.T),
        "qzeros": words(zeros.T),
        "scales": scales.T.contiguous(),
    }


def compressed(integers: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """As compressed-tensors' "pack-quantized", which stores numbers from -8 to 7 higher by 8."""
    inputs = range(0, integers.shape[1], 8)
    tensors = {
        "weight_packed": torch.stack([word(integers[:, i : i + 8].T) for i in inputs], 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(integers.shape),
    }
    if not bool((zeros == 8).all()):
        outputs = range(0, len(zeros), 8)
        tensors["weight_zero_point"] = torch.stack([word(zeros[o : o + 8]) for o in outputs])
    return tensors


def awq_config(group: int) -> dict[str, Any]:
    """The entry of config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["vision_tower", "multi_modal_projector"],
    }


def compressed_config(group: int | None, *, symmetric: bool) -> dict[str, Any]:
    """The entry of config.json; without a group a row has one scale."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
    }


def pack(checkpoint: Path, folder: Path, quantization: dict[str, Any]) -> tuple[Path, Path]:
    """A checkpoint's layers in 4 bits, and with the same weights as floats.

    Args:
        checkpoint: with one file of weights.
        folder: for both.
        quantization: the entry of config.json, which says how.
    """
    packed, floats = (
        Path(shutil.copytree(checkpoint, folder / name)) for name in ("packed", "floats")
    )
    is_awq = quantization["quant_method"] == "awq"
    scheme = quantization if is_awq else quantization["config_groups"]["group_0"]["weights"]
    tensors = load_file(checkpoint / "model.safetensors")
    words, numbers = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not canonical_name(name).startswith("layers.") or weight.dim() != 2:
            continue
        group = scheme["group_size"] or weight.shape[1]
        integers, scales, zeros = rounded(
            weight,
            group,
            symmetric=scheme.get("symmetric", False),
            dtype=torch.float16 if is_awq else torch.bfloat16,
        )
        grouped = integers.view(len(weight), -1, group) - zeros[..., None]
        numbers[name] = (grouped * scales.float()[..., None]).flatten(1).contiguous()
        del words[name]
        parts = (awq if is_awq else compressed)(integers, scales, zeros)
        module = name.removesuffix(".weight")
        words |= {f"{module}.{end}": part.contiguous() for end, part in parts.items()}
    save_file(words, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(numbers, floats / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return packed, floats
