"""What a family says about its pictures and videos: how many tiles, how many tokens, which rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
)

Config = LlavaConfig | LlavaNextConfig | LlavaOnevisionConfig | LlavaNextVideoConfig

PHOTOGRAPH = (768, 1024)
"""Height and width of the picture that memory is planned for."""


class Family(ABC):
    """How pictures become tokens around the vision tower, which only knows tiles of one shape.

    Args:
        config: the checkpoint's.
    """

    config_class: ClassVar[type[Any]]
    """Transformers' class of the configuration."""
    takes_whole_pictures: ClassVar[bool]
    """Whether the size of a picture decides its tiles: it is then never decoded at a smaller
    one."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._tile_side = int(config.vision_config.image_size)
        """Pixels."""
        self._patches = self._tile_side // int(config.vision_config.patch_size)
        """Of a tile, a side."""

    @abstractmethod
    def num_tiles(self, height: int, width: int) -> int:
        """Tiles that the image processor makes of a picture of so many pixels."""

    @abstractmethod
    def rows(self, tiles: Tensor, height: int, width: int, newline: Tensor | None) -> Tensor:
        """What stands in the place of a picture's tokens.

        Args:
            tiles: features [N, T, D] of the picture's N tiles, as the vision encoder makes them.
            height: pixels of the picture, upright.
            width: likewise.
            newline: the checkpoint's newline embedding [D]; None where it has none.

        Returns:
            [R, D], one row a token, on the same device.
        """

    def pooler(self) -> nn.Module | None:
        """What makes of a tile's features, before the projector, those that a video has of it.

        None: nothing has to, before the projector. Else the vision encoder gives both, those of a
        picture's tile first: features [N, T, D] then end with the rows of frames.
        """
        return None

    def fault(self, image_processor: Any, tile_tokens: int) -> str | None:
        """Why the parts of a checkpoint do not fit one another; None: they do.

        Args:
            image_processor: the checkpoint's.
            tile_tokens: T, measured.
        """
        return None

    def num_tokens(self, height: int, width: int, tile_tokens: int) -> int:
        """Tokens of a picture, counted by arranging features that have no content.

        Args:
            height: pixels of the picture, upright.
            width: likewise.
            tile_tokens: T, tokens that the vision encoder makes of a tile.
        """
        shape = (self.num_tiles(height, width), tile_tokens, 1)
        newline = torch.empty(1, device="meta")
        return len(self.rows(torch.empty(shape, device="meta"), height, width, newline))

    @property
    def photograph_tokens(self) -> int:
        """Tokens of an ordinary picture, by the configuration alone: memory is planned for such."""
        return self.num_tokens(*PHOTOGRAPH, self._configured_tile_tokens)

    @property
    def _configured_tile_tokens(self) -> int:
        """One a patch; CLIP has a class token first; "default" leaves the first one out."""
        class_token = int(self._config.vision_config.model_type == "clip_vision_model")
        left_out = int(self._config.vision_feature_select_strategy == "default")
        return self._patches**2 + class_token - left_out


class VideoFamily(Family):
    """A family that was made to see videos, too."""

    @abstractmethod
    def video_rows(self, frames: Tensor, newline: Tensor | None) -> Tensor:
        """What stands in the place of a video's tokens.

        Args:
            frames: features [N, T, D] of its N frames, a tile each.
            newline: as for `rows`.

        Returns:
            [R, D], one row a token, on the same device.
        """

    def num_video_tokens(self, frames: int, tile_tokens: int) -> int:
        """Tokens of a video of so many frames, counted as those of a picture are."""
        features = torch.empty((frames, tile_tokens, 1), device="meta")
        return len(self.video_rows(features, torch.empty(1, device="meta")))

    def video_fault(self, frame: tuple[int, int] | None) -> str | None:
        """Why a checkpoint's video processor does not fit its tower; None: it does.

        Args:
            frame: height and width of what it makes of a frame; None: they differ.
        """
        if frame == (self._tile_side, self._tile_side):
            return None
        made = "frames of different sizes" if frame is None else f"frames of {frame} pixels"
        return f"its video processor makes {made}; its vision tower takes {self._tile_side} a side"
