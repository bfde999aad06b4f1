"""The tensors that hold keys and values, in blocks, for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from llava_triton.device import host_bytes, policy_of, to_device
from llava_triton.kernels.base import BLOCK_TOKENS, AttentionGeometry

CHUNK_BLOCKS = 8
"""Blocks that go to host memory in one piece. On a GPU the last piece is as large: torch keeps what
pinned memory it has ever had, and gives it out again only in the sizes that it was."""
HostBlocks: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Keys and values of blocks in host memory, piece by piece: [CHUNK_BLOCKS, layers, G, ...] each,
the last one perhaps of fewer or with room behind them."""


class Pages:
    """All blocks of keys and values of one text model.

    Its methods run on the device thread only, in the order of the steps.

    Args:
        layers: of the model.
        blocks: how many.
        geometry: of its attention.
        dtype: of keys and values.
        device: where they live.
        keys_by_token: how keys lie in them, see `Kernels`.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        device: torch.device,
        keys_by_token: bool = False,
    ) -> None:
        kv_heads, width = geometry.kv_heads, geometry.head_dim
        by_token, by_number = (BLOCK_TOKENS, width), (width, BLOCK_TOKENS)
        self.blocks = blocks
        self.spare = blocks
        """A block behind those, for what nobody will read."""
        # Not zeroed: on a CPU, pages that no session has used take no memory then.
        self.keys = torch.empty(
            (layers, blocks + 1, kv_heads, *(by_token if keys_by_token else by_number)),
            dtype=dtype,
            device=device,
        )
        """[layers, blocks + 1, G, D, BLOCK_TOKENS] or, by token, [..., BLOCK_TOKENS, D]"""
        self.values = torch.empty(
            (layers, blocks + 1, kv_heads, *by_token), dtype=dtype, device=device
        )
        """[layers, blocks + 1, G, BLOCK_TOKENS, D]"""

    def copy(self, source: int, target: int) -> None:
        """One block's content to another block."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def to_host(self, blocks: Sequence[int]) -> HostBlocks:
        """Copies of blocks in host memory.

        For `from_host` only: on a GPU they are still being made when this returns.
        """
        index = to_device(np.array(blocks, dtype=np.int64), self.keys.device)
        return [
            (_to_host(self.keys, part), _to_host(self.values, part))
            for part in index.split(CHUNK_BLOCKS)
        ]

    def pin_host_memory(self, most: int) -> None:
        """Let the host's driver pin memory for copies now, rather than amid answers, which wait for
        it: some 100 ms for a session. torch keeps it for `to_host`.

        Args:
            most: bytes.
        """
        shapes = [(CHUNK_BLOCKS, *each[:, 0].shape) for each in (self.keys, self.values)]
        kept, left = [], most
        while left >= (piece := self.host_bytes(CHUNK_BLOCKS)):
            kept += [pinned_memory(shape, self.keys.dtype) for shape in shapes]
            left -= piece

    def host_bytes(self, blocks: int) -> int:
        """Bytes of host memory that copies of so many blocks take."""
        device = self.keys.device
        if not policy_of(device).is_host:
            blocks = -(-blocks // CHUNK_BLOCKS) * CHUNK_BLOCKS
        chunks, rest = divmod(blocks, CHUNK_BLOCKS)
        return sum(
            count * host_bytes(size * each[:, 0].nbytes, device)
            for each in (self.keys, self.values)
            for count, size in ((chunks, CHUNK_BLOCKS), (1, rest))
            if size
        )

    def from_host(self, copies: HostBlocks, first: int, blocks: Sequence[int]) -> None:
        """Write what `to_host` gave, from its block `first` on, to other blocks."""
        index = to_device(np.array(blocks, dtype=np.int64), self.keys.device)
        done = 0
        while done < len(blocks):
            chunk, begin = divmod(first + done, CHUNK_BLOCKS)
            end = min(CHUNK_BLOCKS, begin + len(blocks) - done)
            part = index[done : done + end - begin]
            for each, copy in zip((self.keys, self.values), copies[chunk], strict=True):
                moved = copy[begin:end].to(each.device, non_blocking=True)
                each.transpose(0, 1)[part] = moved
            done += end - begin


def _to_host(pages: Tensor, index: Tensor) -> Tensor:
    """Up to `CHUNK_BLOCKS` blocks, [n, layers, ...]."""
    # An index makes a copy, also where the device is the host.
    copied = pages.transpose(0, 1)[index].contiguous()
    if policy_of(pages.device).is_host:
        return copied
    host = pinned_memory((CHUNK_BLOCKS, *copied.shape[1:]), copied.dtype)
    host[: len(copied)].copy_(copied, non_blocking=True)
    return host


def pinned_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of the host, of unspecified content."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def block_bytes(layers: int, geometry: AttentionGeometry, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    numbers = 2 * layers * BLOCK_TOKENS * geometry.kv_heads * geometry.head_dim
    return numbers * dtype.itemsize
