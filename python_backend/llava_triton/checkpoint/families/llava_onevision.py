"""LLaVA-OneVision: LLaVA-NeXT's tiles, and a grid of many patches is shrunk to fewer."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import interpolate
from transformers import LlavaOnevisionConfig

from llava_triton.checkpoint.families.llava_next import LlavaNext

KEPT_RATIO = 1.1
"""A grid is shrunk from so many times the longest side on."""


class LlavaOnevision(LlavaNext):
    """As `LlavaOnevisionModel.pack_image_features` arranges a picture that is shown alone.

    Transformers' processor shows pictures without tiles where a prompt has several. Here a picture
    is always shown as if it were alone: what a session has seen must not change when another one
    comes.
    """

    config_class = LlavaOnevisionConfig

    def _shrunk(self, grid: Tensor) -> Tensor:
        """At most about as many patches as `vision_aspect_ratio` has tiles ("anyres_max_9")."""
        height, width = grid.shape[1:]
        most = int(self._config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * self._patches**2))
        if ratio <= KEPT_RATIO:
            return grid
        size = [int(height // ratio), int(width // ratio)]
        return interpolate(grid[None], size, mode="bilinear")[0]
