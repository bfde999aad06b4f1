"""LLaVA-1.5 and its like: a picture is one tile, and every picture has as many tokens."""

from __future__ import annotations

from torch import Tensor
from transformers import LlavaConfig

from llava_triton.checkpoint.families.base import Family


class Llava(Family):
    """The tower's features are the picture's rows."""

    config_class = LlavaConfig
    takes_whole_pictures = False

    def num_tiles(self, height: int, width: int) -> int:
        """One."""
        return 1

    def rows(self, tiles: Tensor, height: int, width: int, newline: Tensor | None) -> Tensor:
        """See `Family.rows`."""
        return tiles[0]
