"""LLaVA-NeXT-Video: pictures as LLaVA-NeXT's; a video's frames have a quarter of the tokens.

    tile ──► tower ──► features ─────────────► projector ──► of a picture's tile
                           └──► averaged 2 x 2 ──► projector ──► of a video's frame

The averaging is before the projector, so the vision encoder does it, of every tile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

from llava_triton.checkpoint.families.base import VideoFamily
from llava_triton.checkpoint.families.llava_next import LlavaNext

POOLS = ("average", "max")
"""Those without weights."""


class LlavaNextVideo(LlavaNext, VideoFamily):
    """As `LlavaNextVideoModel.pack_image_features` and `get_video_features`."""

    config_class = LlavaNextVideoConfig

    def rows(self, tiles: Tensor, height: int, width: int, newline: Tensor | None) -> Tensor:
        """See `Family.rows`."""
        return super().rows(tiles[:, : self._patches**2], height, width, newline)

    def video_rows(self, frames: Tensor, newline: Tensor | None) -> Tensor:
        """See `VideoFamily.video_rows`: frame by frame, without a newline."""
        return frames[:, self._patches**2 :].flatten(0, 1)

    def pooler(self) -> nn.Module | None:
        """See `Family.pooler`."""
        pooler: nn.Module = LlavaNextVideoPooler(self._config)
        return pooler

    def fault(self, image_processor: Any, tile_tokens: int) -> str | None:
        """See `Family.fault`."""
        mode = self._config.spatial_pool_mode
        if mode not in POOLS:
            return f"its spatial_pool_mode is {mode!r}; served are {', '.join(POOLS)}"
        pooled = (self._patches // int(self._config.spatial_pool_stride)) ** 2
        return super().fault(image_processor, tile_tokens - pooled)
