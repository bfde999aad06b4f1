"""Steps in which every sequence brings one token, in shapes made beforehand.

On a GPU each is a CUDA graph, so that a step costs one launch instead of some hundreds.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_triton.device import cuda_graph, graph_pool, to_device
from llava_triton.kernels.base import BLOCK_TOKENS, Rows
from llava_triton.model.step import StepPart

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sequences of a step. One of fewer is filled up; one of more is computed without a graph."""
NARROWEST = 64
"""Blocks of the narrowest tables; each next ones are twice as wide."""

Decode = Callable[[Tensor, Rows, Tensor], Tensor]
"""(token IDs int64 [S], or what `token_after` gives; where they belong; where logits float32 [S, V]
are written to) -> these logits; waits for nothing."""


@dataclass(frozen=True, eq=False)
class _Graph:
    """One shape of a step: S sequences with tables of B blocks."""

    given: Tensor
    """int32 [S * (2 + B)] on the device, where the step reads it: token IDs, contexts, tables."""
    run: Callable[[], Tensor]
    """Computes the step; its logits hold until any graph runs again."""


class DecodeGraphs:
    """The CUDA graphs of one model.

    Made where nothing else uses the device: a capture would include it.

    Args:
        decode: the model.
        device: where it computes. Other than a GPU, it computes in the same shapes without graphs.
        spare_block: that no session has; what fills a step up is written there.
        sequences: at once at the most.
        context_length: of a sequence at the most, in tokens.
        vocabulary: how many tokens there are logits for.
    """

    def __init__(
        self,
        decode: Decode,
        device: torch.device,
        spare_block: int,
        sequences: int,
        context_length: int,
        vocabulary: int,
    ) -> None:
        self._decode = decode
        self._device = device
        self._spare_block = spare_block
        self._sizes = _up_to(SIZES, sequences)
        widths = (NARROWEST << doublings for doublings in itertools.count())
        self._widths = _up_to(widths, -(-context_length // BLOCK_TOKENS))
        # One for all: logits that each graph kept would be gigabytes.
        self._logits = torch.empty(
            (self._sizes[-1], vocabulary), dtype=torch.float32, device=device
        )
        self._pool = graph_pool(device)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        began = time.monotonic()
        # The largest first: the others' memory fits into theirs.
        for width in reversed(self._widths):
            for size in reversed(self._sizes):
                self._graphs[size, width] = self._capture(size, width)
        log.info("%d decode steps captured in %.1f s", len(self._graphs), time.monotonic() - began)

    def takes(self, parts: Sequence[StepPart]) -> bool:
        """Whether there is a graph for a step."""
        return (
            len(parts) <= self._sizes[-1]
            and all(len(part.ids) == 1 and not part.image_rows for part in parts)
            and max(len(part.blocks) for part in parts) <= self._widths[-1]
        )

    def logits(self, parts: Sequence[StepPart]) -> Tensor:
        """Compute a step that `takes` has agreed to.

        Returns:
            [len(parts), V]; they hold until the next call.
        """
        size = _first_from(self._sizes, len(parts))
        width = _first_from(self._widths, max(len(part.blocks) for part in parts))
        graph = self._graphs[size, width]
        # Not waited for: the step before may read `given` at this moment.
        graph.given.copy_(to_device(self._numbers(size, width, parts), self._device))
        return graph.run()[: len(parts)]

    def _numbers(
        self, size: int, width: int, parts: Sequence[StepPart]
    ) -> np.ndarray[Any, np.dtype[np.int32]]:
        numbers = np.zeros(size * (2 + width), dtype=np.int32)
        ids, contexts = numbers[:size], numbers[size : 2 * size]
        tables = numbers[2 * size :].reshape(size, -1)
        for index, part in enumerate(parts):
            ids[index] = part.ids[0]
            contexts[index] = part.context
            tables[index, : len(part.blocks)] = part.blocks
        tables[len(parts) :, 0] = self._spare_block
        return numbers

    def _capture(self, size: int, width: int) -> _Graph:
        given = to_device(self._numbers(size, width, ()), self._device)
        ids, contexts = given[:size], given[size : 2 * size]
        starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        tables = given[2 * size :].view(size, width)

        def run() -> Tensor:
            rows = Rows(starts, contexts, tables, contexts.long())
            return self._decode(ids.long(), rows, self._logits[:size])

        return _Graph(given, cuda_graph(run, self._device, self._pool))


def _up_to(ascending: Iterable[int], most: int) -> list[int]:
    """The numbers up to the first that is not less than `most`."""
    taken: list[int] = []
    for number in ascending:
        taken.append(number)
        if number >= most:
            break
    return taken


def _first_from(ascending: Sequence[int], least: int) -> int:
    """The first number that is not less."""
    return next(number for number in ascending if number >= least)
