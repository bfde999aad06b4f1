"""LLaVA-NeXT, which is LLaVA-1.6: an overview of the picture, then its tiles line by line.

    picture ──► the resolution of `image_grid_pinpoints` that wastes least ──► overview + tiles
    features ──► tiles joined to one grid of patches ──► rows and columns of padding cut off
             ──► a newline embedding behind every line ──► overview, then the lines

So a picture of another size has another number of tokens: 2,880 and a few newlines at the most with
the published checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from llava_triton.checkpoint.families.base import Family


class LlavaNext(Family):
    """Tiles by the picture's resolution, as `LlavaNextModel.pack_image_features` arranges them."""

    config_class = LlavaNextConfig
    takes_whole_pictures = True

    def num_tiles(self, height: int, width: int) -> int:
        """The overview, and those of the grid."""
        lines, columns = self._grid(height, width)
        return 1 + lines * columns

    def rows(self, tiles: Tensor, height: int, width: int, newline: Tensor | None) -> Tensor:
        """See `Family.rows`."""
        assert newline is not None
        lines, columns = self._grid(height, width)
        side, depth = self._patches, tiles.shape[-1]
        grid = tiles[1:].view(lines, columns, side, side, depth)
        grid = grid.permute(4, 0, 2, 1, 3).reshape(depth, lines * side, columns * side)
        grid = self._shrunk(unpad_image(grid, (height, width)))
        ends = newline.to(grid)[:, None, None].expand(depth, grid.shape[1], 1)
        return torch.cat([tiles[0], torch.cat([grid, ends], dim=2).flatten(1).T])

    def fault(self, image_processor: Any, tile_tokens: int) -> str | None:
        """See `Family.fault`."""
        wanted = _sizes(self._config.image_grid_pinpoints)
        found = _sizes(getattr(image_processor, "image_grid_pinpoints", None) or ())
        if wanted != found:
            return (
                f"its image processor cuts pictures into other tiles (image_grid_pinpoints {found})"
                f" than its config.json says ({wanted})"
            )
        if any(side % self._tile_side for size in wanted for side in size):
            return (
                f"image_grid_pinpoints are {wanted}, which are no whole tiles of {self._tile_side} "
                "pixels a side"
            )
        if tile_tokens != self._patches**2:
            return (
                f"its vision tower makes {tile_tokens} tokens of a tile of {self._patches} x "
                f"{self._patches} patches, which cannot be put side by side; "
                "vision_feature_select_strategy is 'default' for CLIP towers and 'full' for SigLIP"
            )
        return None

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Lines and columns of tiles behind the overview."""
        lines, columns = get_anyres_image_grid_shape(
            (height, width), self._config.image_grid_pinpoints, self._tile_side
        )
        return int(lines), int(columns)

    def _shrunk(self, grid: Tensor) -> Tensor:
        """The patches [D, H, W] that become tokens: all of them."""
        return grid


def _sizes(pinpoints: Any) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in pinpoints]
