"""LLaVA-OneVision: LLaVA-NeXT's tiles, and a grid of many patches is shrunk to fewer.

A video is its frames, a tile each, shrunk to half as many patches a side, and a newline embedding.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import LlavaOnevisionConfig

from llava_triton.checkpoint.families.base import VideoFamily
from llava_triton.checkpoint.families.llava_next import LlavaNext

AT_MOST = "anyres_max_"
"""Before the number of tiles, in the configuration."""
KEPT_RATIO = 1.1
"""A grid is shrunk from so many times the longest side on."""


class LlavaOnevision(LlavaNext, VideoFamily):
    """As `LlavaOnevisionModel.pack_image_features` arranges a picture that is shown alone.

    Transformers' processor shows pictures without tiles where a prompt has several. Here a picture
    is always shown as if it were alone: what a session has seen must not change when another one
    comes.
    """

    config_class = LlavaOnevisionConfig

    def fault(self, image_processor: Any, tile_tokens: int) -> str | None:
        """See `Family.fault`."""
        ratio = self._config.vision_aspect_ratio
        if not re.fullmatch(rf"{AT_MOST}[1-9]\d*", ratio):
            return f"its vision_aspect_ratio is {ratio!r}; served are those like 'anyres_max_9'"
        return super().fault(image_processor, tile_tokens)

    def video_rows(self, frames: Tensor, newline: Tensor | None) -> Tensor:
        """See `VideoFamily.video_rows`: frames of half as many patches a side, and one newline
        behind the last of them."""
        assert newline is not None
        side, depth = self._patches, frames.shape[-1]
        grids = frames.view(-1, side, side, depth).permute(0, 3, 1, 2).contiguous()
        half = math.ceil(side / 2)
        grids = interpolate(grids, [half, half], mode="bilinear")
        rows = grids.permute(0, 2, 3, 1).reshape(-1, depth)
        return torch.cat([rows, newline.to(rows)[None]])

    def _shrunk(self, grid: Tensor) -> Tensor:
        """At most about as many patches as `vision_aspect_ratio` has tiles ("anyres_max_9")."""
        height, width = grid.shape[1:]
        most = int(self._config.vision_aspect_ratio.removeprefix(AT_MOST))
        ratio = math.sqrt(height * width / (most * self._patches**2))
        if ratio <= KEPT_RATIO:
            return grid
        size = [int(height // ratio), int(width // ratio)]
        return interpolate(grid[None], size, mode="bilinear")[0]
