"""The vision encoder in torch, for GPUs without Triton's TensorRT backend."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.vision_tower import load_vision_encoder
from llava_triton.checkpoint.weights import CheckpointWeights
from llava_triton.device import cuda_graph, graph_pool, name_of, wait_for

log = logging.getLogger(__name__)


class TorchEncoding:
    """The checkpoint's vision tower and projector, in batches of a few sizes.

    On a GPU each size is a CUDA graph. A batch between two sizes is filled up; one above the
    largest is computed in parts.

    Args:
        checkpoint: its directory; the language model's weights are not read.
        device: where to compute.
        dtype: in what; the features of a half type are exact in the float32 that is returned.
        max_batch: tiles at once at the most.
    """

    def __init__(
        self, checkpoint: Path, device: torch.device, dtype: torch.dtype, max_batch: int
    ) -> None:
        config = llava_config(checkpoint)
        encoder = load_vision_encoder(config, CheckpointWeights(checkpoint)).to(device, dtype)
        side = int(config.vision_config.image_size)
        self._sizes = [1 << power for power in range(max_batch.bit_length())]
        # One memory for all sizes: only one runs at a time.
        self._pixels = torch.zeros(self._sizes[-1], 3, side, side, dtype=dtype, device=device)

        def run(size: int) -> Callable[[], Tensor]:
            return lambda: encoder(self._pixels[:size]).float()

        self._runs = {size: run(size) for size in self._sizes}
        try:
            self._record(device)
        except RuntimeError as error:  # slower is better than not at all
            log.warning("the vision encoder runs unrecorded: %s", error)
        self.name = (
            f"torch {torch.__version__} on {name_of(device)} ({str(dtype).removeprefix('torch.')})"
        )

    @torch.inference_mode()
    def _record(self, device: torch.device) -> None:
        pool = graph_pool(device)
        for size in reversed(self._sizes):  # the others' memory fits into the largest's
            self._runs[size] = cuda_graph(self._runs[size], device, pool)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """See `VisionEncoding`."""
        parts = []
        for part in torch.from_numpy(pixels).split(self._sizes[-1]):
            size = self._sizes[bisect.bisect_left(self._sizes, len(part))]
            self._pixels[: len(part)].copy_(part)
            parts.append(self._runs[size]()[: len(part)].clone())
        features = torch.cat(parts)
        wait_for(features)  # another process is going to read them
        return features
