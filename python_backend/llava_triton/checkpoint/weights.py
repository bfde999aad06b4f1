"""A checkpoint's weights as they lie on disk: what is there, what it hashes to, parts of it loaded.

The vision encoder is a few percent of a LLaVA. The export and the encoder's process read it alone,
the language model's process reads the rest, each tensor straight to where it is used: so a host
needs little more memory than a piece of a tensor. Names and shapes are checked for all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_triton.checkpoint.packed import (
    TOLD_SHAPE,
    Packing,
    UnpackedMatrix,
    UnreadPackingError,
    packing_of,
)

if TYPE_CHECKING:
    from io import RawIOBase

    import torch

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WRAPPERS = {"model", "vision_model", "language_model"}
_COMPUTED = ("position_ids", "inv_freq")
"""Buffers that some published checkpoints contain and no release of transformers reads."""
_LAYERS = "layers."
"""How the canonical names of the text model's layers begin."""
_VISION = ("vision_tower.", "multi_modal_projector.")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names of what safetensors calls the types that weights are read in."""
_INTEGERS = {"I32": "int32", "I64": "int64"}
"""Likewise of words that hold several packed weights, and of a matrix's shape."""
PIECE_BYTES = 32 * 1024 * 1024
"""What is in host memory at a time of a tensor that is read to a GPU or into another type."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read: a sentence says what is wrong and what to give."""


def unusable(directory: Path, part: str, error: Exception) -> CheckpointError:
    """What to say where transformers does not load a part of a checkpoint, such as a tokenizer."""
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"{directory} brings Python code of its own (auto_map in one of its JSON files), which "
            "is never run; give a checkpoint that transformers' own classes load"
        )
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{directory} has no usable {part}: {reason}")


def canonical_name(name: str) -> str:
    """A tensor's name without the modules that LLaVA releases put around its parts.

    `language_model.model.layers.0.mlp.up_proj.weight` of the published checkpoints and
    `model.language_model.layers.0.mlp.up_proj.weight` of transformers 5 are the same tensor,
    `layers.0.mlp.up_proj.weight`.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    name: str
    """Its name in that file."""
    dtype: str
    """As safetensors spells it: "F16", "BF16", "F32", ..."""
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    size: int
    """Bytes."""


class CheckpointWeights:
    """The tensors of a checkpoint directory by canonical name; nothing is loaded yet.

    Raises:
        CheckpointError: the directory has no safetensors weights, or a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(directory):
            for tensor in _read_header(file):
                self._tensors[canonical_name(tensor.name)] = tensor
        self._packing = _packing(directory)

    def __contains__(self, name: str) -> bool:
        return canonical_name(name) in self._tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor by any release's name; None: there is none."""
        stored = self._tensors.get(canonical_name(name))
        return None if stored is None else stored.shape

    def is_packed(self, module: str) -> bool:
        """Whether a module of the text model's layers, by any release's name, has 4-bit weights in
        place of a `weight`."""
        packing, name = self._packing, canonical_name(module)
        in_layer = name.startswith(_LAYERS)
        return packing is not None and in_layer and f"{name}.{packing.telling}" in self._tensors

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Compare names and shapes with what the model needs.

        Args:
            expected: shapes by any release's names.
            optional: those of them that may be missing, such as tied weights.

        Raises:
            CheckpointError: a weight is missing, unexpected or of the wrong shape. transformers
                would fill it with random numbers and go on.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        untrue: set[str] = set()
        """Tensors that tell another shape of a packed matrix."""
        for name, shape in expected.items():
            module = canonical_name(name).removesuffix(".weight")
            if self._packing is not None and name.endswith(".weight") and self.is_packed(module):
                packed = self._packing.shapes(*shape)
                shapes |= {f"{module}.{end}": each for end, each in packed.items()}
                told = f"{module}.{TOLD_SHAPE}"
                if self.shape(told) == (2,) and self._integers(told) != list(shape):
                    untrue.add(told)
            else:
                shapes[canonical_name(name)] = shape
        present = {name for name in self._tensors if not name.endswith(_COMPUTED)}
        faults = {
            "missing": sorted(
                shapes.keys() - present - {canonical_name(name) for name in optional}
            ),
            "unexpected": sorted(present - shapes.keys()),
            "of the wrong shape": sorted(
                name
                for name in present & shapes.keys()
                if self._tensors[name].shape != tuple(shapes[name]) or name in untrue
            ),
        }
        found = [f"{len(names)} {kind} ({_few(names)})" for kind, names in faults.items() if names]
        if found:
            raise CheckpointError(
                f"the weights in {self.directory} do not fit its config.json: {'; '.join(found)}; "
                "give a complete checkpoint"
            )

    def _integers(self, name: str) -> list[int]:
        import torch

        values = torch.empty(self.shape(name) or (), dtype=torch.int64)
        self.read_into(name, values)
        return [int(value) for value in values]

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors in float32, under the names they are asked for by.

        Raises:
            KeyError: the checkpoint has none of that name; see `check`.
            CheckpointError: as `read_into`.
        """
        import torch

        loaded = {}
        for name in names:
            stored = self._tensors[canonical_name(name)]
            loaded[name] = torch.empty(stored.shape, dtype=torch.float32)
            self.read_into(name, loaded[name])
        return loaded

    def packed(self, module: str, device: torch.device) -> UnpackedMatrix:
        """The 4-bit weights of a module that `is_packed`.

        Args:
            module: by any release's name.
            device: where they are unpacked.

        Raises:
            CheckpointError: as `read_into`.
        """
        import torch

        packing, name = self._packing, canonical_name(module)
        assert packing is not None
        tensors = {}
        for end in packing.shapes(8, 8):
            stored = self._tensors[f"{name}.{end}"]
            kind = getattr(torch, _INTEGERS.get(stored.dtype, "float32"))
            tensors[end] = torch.empty(stored.shape, dtype=kind, device=device)
            self.read_into(f"{name}.{end}", tensors[end])
        return packing.unpacked(tensors)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor from its file to where it is used, without another copy of the whole.

        Args:
            name: of any release.
            target: of its shape, contiguous, on any device: of any float type, or of integers where
                it is of such.

        Raises:
            KeyError: the checkpoint has none of that name; see `check`.
            CheckpointError: it is of another shape, of no such type, or its file has changed.
        """
        import torch

        stored = self._tensors[canonical_name(name)]
        dtypes = _DTYPES if target.dtype.is_floating_point else _INTEGERS
        if stored.dtype not in dtypes:
            raise CheckpointError(
                f"{name} in {stored.file} is stored as {stored.dtype}; weights are read from "
                f"{', '.join(dtypes)}: give the checkpoint that it was made from"
            )
        if tuple(target.shape) != stored.shape:
            raise CheckpointError(
                f"{name} in {stored.file} is {list(stored.shape)}, and the model needs "
                f"{list(target.shape)}; give a checkpoint that fits its config.json"
            )
        assert target.is_contiguous()
        dtype: torch.dtype = getattr(torch, dtypes[stored.dtype])
        flat = target.view(-1)
        step = PIECE_BYTES // dtype.itemsize
        between = None
        if target.device.type != "cpu" or target.dtype != dtype:
            size = min(step, len(flat))
            between = torch.empty(size, dtype=dtype, pin_memory=target.device.type == "cuda")
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            for part in flat.split(step):
                read = part if between is None else between[: len(part)]
                _read_exactly(file, read, stored)
                if between is not None:
                    part.copy_(read)

    def vision_sha256(self) -> str:
        """SHA-256 over `config.json` and the names, types, shapes and bytes of the vision tower's
        and the projector's weights: all that a vision encoder is made of."""
        digest = hashlib.sha256((self.directory / CONFIG).read_bytes())
        for name in sorted(name for name in self._tensors if name.startswith(_VISION)):
            tensor = self._tensors[name]
            digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
            with tensor.file.open("rb") as file:
                file.seek(tensor.begin)
                left = tensor.size
                while left and (block := file.read(min(left, 1 << 22))):
                    digest.update(block)
                    left -= len(block)
        return digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _INDEX).is_file():
        index = json.loads((directory / _INDEX).read_text())
        files = sorted({directory / name for name in index["weight_map"].values()})
    else:
        files = [directory / _SINGLE]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{directory} has no {file.name}; a checkpoint's weights are read from safetensors "
                "files (`save_pretrained` of transformers writes them)"
            )
    return files


def _read_header(file: Path) -> list[StoredTensor]:
    """The table at the head of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = [
            StoredTensor(
                file=file,
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=8 + length + entry["data_offsets"][0],
                size=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
        if any(tensor.begin + tensor.size > size for tensor in tensors):
            raise ValueError("it is shorter than its header says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no intact safetensors file: {error}") from error
    return tensors


def _packing(directory: Path) -> Packing | None:
    try:
        config = json.loads((directory / CONFIG).read_text())
        return packing_of(config) if isinstance(config, dict) else None
    except (OSError, ValueError, UnreadPackingError):
        return None  # `llava_config` says what is wrong with it


def _read_exactly(file: RawIOBase, target: torch.Tensor, stored: StoredTensor) -> None:
    """The next bytes of a file, as many as a contiguous tensor in host memory has."""
    import torch

    left = target.view(torch.uint8).numpy().data
    while left:
        count = file.readinto(left)
        if not count:
            raise CheckpointError(f"{stored.file} ended amid {stored.name}; give an intact file")
        left = left[count:]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
