"""The tensors that hold keys and values, in blocks, for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llava_triton.device import host_bytes, to_device, to_host
from llava_triton.paged_attention.interface import BLOCK_TOKENS, AttentionGeometry


class Pages:
    """All blocks of keys and values of one text model.

    Its methods run on the device thread only, in the order of the steps.

    Args:
        layers: of the model.
        blocks: how many.
        geometry: of its attention.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        kv_heads, width = geometry.kv_heads, geometry.head_dim
        self.blocks = blocks
        self.spare = blocks
        """A block behind those, for what nobody will read."""
        # Not zeroed: on a CPU, pages that no session has used take no memory then.
        self.keys = torch.empty(
            (layers, blocks + 1, kv_heads, width, BLOCK_TOKENS), dtype=dtype, device=device
        )
        """[layers, blocks + 1, G, D, BLOCK_TOKENS]"""
        self.values = torch.empty(
            (layers, blocks + 1, kv_heads, BLOCK_TOKENS, width), dtype=dtype, device=device
        )
        """[layers, blocks + 1, G, BLOCK_TOKENS, D]"""

    def copy(self, source: int, target: int) -> None:
        """One block's content to another block."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def to_host(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of blocks in host memory: keys and values, [layers, len(blocks), G, ...].

        For `from_host` only: on a GPU they are still being made when this returns.
        """
        index = to_device(np.array(blocks, dtype=np.int64), self.keys.device)
        # An index makes a copy, also where the device is the host.
        return to_host(self.keys[:, index]), to_host(self.values[:, index])

    def host_bytes(self, blocks: int) -> int:
        """Bytes of host memory that copies of so many blocks take."""
        return sum(
            host_bytes(blocks * each[:, 0].nbytes, each.device) for each in (self.keys, self.values)
        )

    def from_host(self, keys: Tensor, values: Tensor, blocks: Sequence[int]) -> None:
        """Write what `to_host` gave, block by block, to other blocks."""
        index = to_device(np.array(blocks, dtype=np.int64), self.keys.device)
        self.keys[:, index] = keys.to(self.keys.device, non_blocking=True)
        self.values[:, index] = values.to(self.values.device, non_blocking=True)


def block_bytes(layers: int, geometry: AttentionGeometry, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    numbers = 2 * layers * BLOCK_TOKENS * geometry.kv_heads * geometry.head_dim
    return numbers * dtype.itemsize
