"""4-bit weights of checkpoints that were quantized before: two layouts are read as they are.

- AWQ's for its "gemm" kernels (AutoAWQ, `WQLinear_GEMM`): `qweight` [inputs, outputs / 8],
  `qzeros` [groups, outputs / 8] and `scales` [groups, outputs]. A word has eight outputs: four bits
  after another 0, 2, 4, 6, 1, 3, 5, 7.
- compressed-tensors' "pack-quantized" (llm-compressor): `weight_packed` [outputs, inputs / 8],
  `weight_scale` [outputs, groups], `weight_shape`, and where zero is not 8 `weight_zero_point`
  [outputs / 8, groups]. A word has eight inputs, or eight outputs' zero points, in order. Numbers
  from -8 to 7 are stored 8 higher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
WHOLE_ROW = -1
"""As a group size: a row has one scale."""
TOLD_SHAPE = "weight_shape"
"""The end of the name of a tensor that tells a matrix's outputs and inputs."""
SMALL_GROUPS, GROUP_MULTIPLE = (32, 64), 128
"""Sizes of groups that are read, and what others are a multiple of."""


class UnpackedMatrix(NamedTuple):
    """W is (integers - zero) * scale."""

    integers: torch.Tensor
    """uint8 [outputs, inputs], 0 to 15."""
    scales: torch.Tensor
    """float32 [outputs, groups]."""
    zeros: torch.Tensor
    """uint8 [outputs, groups], 0 to 15."""
    group: int
    """Inputs of a group; `WHOLE_ROW`: all of them."""


class UnreadPackingError(Exception):
    """How a checkpoint was quantized, as the end of "quantized by ...", where that is not read."""


class Packing(Protocol):
    """How a module's matrix lies in several tensors, of names that begin with the module's."""

    @property
    def telling(self) -> str:
        """The tensor that every packed module has."""

    def shapes(self, outputs: int, inputs: int) -> dict[str, Shape]:
        """Of the tensors that stand in place of a `weight`, by the ends of their names."""

    def unpacked(self, tensors: Mapping[str, torch.Tensor]) -> UnpackedMatrix:
        """The matrix.

        Args:
            tensors: of a module, as `shapes` has them: words as int32, scales as float32.
        """


@dataclass(frozen=True)
class Awq:
    """Implements `Packing`."""

    group: int
    """Inputs, or `WHOLE_ROW`."""
    telling = "qweight"

    def shapes(self, outputs: int, inputs: int) -> dict[str, Shape]:
        """See `Packing`."""
        groups = _groups(inputs, self.group)
        return {
            "qweight": (inputs, outputs // 8),
            "qzeros": (groups, outputs // 8),
            "scales": (groups, outputs),
        }

    def unpacked(self, tensors: Mapping[str, torch.Tensor]) -> UnpackedMatrix:
        """See `Packing`."""
        integers, zeros = (
            # Where the outputs 0 to 7 are among the words' fours.
            _nibbles(tensors[name]).unflatten(1, (-1, 8))[..., [0, 4, 1, 5, 2, 6, 3, 7]]
            for name in ("qweight", "qzeros")
        )
        integers, zeros = integers.flatten(1).T, zeros.flatten(1).T
        return UnpackedMatrix(integers, tensors["scales"].T, zeros, self.group)


@dataclass(frozen=True)
class CompressedTensors:
    """Implements `Packing`."""

    group: int
    """Inputs, or `WHOLE_ROW`."""
    symmetric: bool
    """Whether zero is stored as 8 everywhere."""
    telling = "weight_packed"

    def shapes(self, outputs: int, inputs: int) -> dict[str, Shape]:
        """See `Packing`."""
        groups = _groups(inputs, self.group)
        shapes: dict[str, Shape] = {
            "weight_packed": (outputs, -(-inputs // 8)),
            "weight_scale": (outputs, groups),
            TOLD_SHAPE: (2,),
        }
        if not self.symmetric:
            shapes["weight_zero_point"] = (-(-outputs // 8), groups)
        return shapes

    def unpacked(self, tensors: Mapping[str, torch.Tensor]) -> UnpackedMatrix:
        """See `Packing`."""
        import torch

        outputs, inputs = tensors[TOLD_SHAPE].tolist()
        scales = tensors["weight_scale"]
        if self.symmetric:
            zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=scales.device)
        else:
            zeros = _nibbles(tensors["weight_zero_point"].T.contiguous())[:, :outputs].T
        integers = _nibbles(tensors["weight_packed"])[:, :inputs]
        return UnpackedMatrix(integers, scales, zeros, self.group)


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """How a checkpoint's weights are packed; None: they are not quantized.

    Args:
        config: of its config.json.

    Raises:
        UnreadPackingError: they are quantized in another way.
    """
    text = config.get("text_config")
    quantized = config.get("quantization_config")
    if not quantized and isinstance(text, dict):
        quantized = text.get("quantization_config")
    if not quantized:
        return None
    try:
        method = quantized.get("quant_method") or "an unnamed library"
        if method == "awq":
            return _awq(quantized)
        if method == "compressed-tensors":
            return _compressed_tensors(quantized)
    except (AttributeError, TypeError) as error:  # a value of another type than is written
        raise UnreadPackingError("a library whose quantization_config is not understood") from error
    raise UnreadPackingError(method)


def _awq(config: Mapping[str, Any]) -> Awq:
    version = config.get("version", "gemm")
    if config.get("bits") != 4 or str(version).lower() != "gemm":
        raise UnreadPackingError(f"awq, to {config.get('bits')} bits for {version!r} kernels")
    return Awq(_checked_group(config.get("group_size"), "awq"))


def _compressed_tensors(config: Mapping[str, Any]) -> CompressedTensors:
    name = "compressed-tensors"
    if config.get("format") != "pack-quantized" or config.get("transform_config"):
        raise UnreadPackingError(f"{name}, in the format {config.get('format')!r}")
    schemes = list((config.get("config_groups") or {}).values())
    kinds = {_kind(scheme) for scheme in schemes}
    if len(kinds) != 1 or None in kinds:
        raise UnreadPackingError(f"{name}, by another scheme than one of 4-bit weights in groups")
    (kind,) = kinds
    assert kind is not None
    group, symmetric = kind
    return CompressedTensors(_checked_group(group, name), symmetric)


def _kind(scheme: Mapping[str, Any]) -> tuple[int | None, bool] | None:
    """Group size and symmetry of 4-bit weights; None: it is another scheme."""
    weights = scheme.get("weights") or {}
    ordered = weights.get("actorder") not in (None, False, "weight", "static")
    alone = not scheme.get("input_activations") and not scheme.get("output_activations")
    integers = weights.get("num_bits") == 4 and weights.get("type", "int") == "int"
    if ordered or not alone or not integers:
        return None
    symmetric = bool(weights.get("symmetric", True))
    if weights.get("strategy") == "channel":
        return WHOLE_ROW, symmetric
    return (weights.get("group_size"), symmetric) if weights.get("strategy") == "group" else None


def _checked_group(group: Any, name: str) -> int:
    if isinstance(group, int):
        multiple = group > 0 and group % GROUP_MULTIPLE == 0
        if multiple or group in (WHOLE_ROW, *SMALL_GROUPS):
            return group
    raise UnreadPackingError(f"{name}, in groups of {group!r}")


def _groups(inputs: int, group: int) -> int:
    return 1 if group == WHOLE_ROW else -(-inputs // group)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [N, M], contiguous -> uint8 [N, 8 * M], the low ones first."""
    import torch

    pairs = words.view(torch.uint8)  # little-endian, as safetensors are
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)
