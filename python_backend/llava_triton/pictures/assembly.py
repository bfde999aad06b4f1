"""A checkpoint's pictures, from the client's bytes to the rows that stand in their tokens' places.

The vision encoder only knows tiles of one shape. What is before and behind it differs from family
to family: see `llava_triton.checkpoint.families`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.families import family_of
from llava_triton.checkpoint.vision_tower import features_shape, load_newline
from llava_triton.checkpoint.weights import CheckpointWeights
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import OpenPicture, PixelValues, Tiles, open_picture


class PictureAssembly:
    """Makes pixel values of pictures and, of their encoded tiles, image features.

    Args:
        checkpoint: its directory; of the weights only the newline embedding is read.
        processor: directory of its image processor.
        settings: limits.
    """

    def __init__(self, checkpoint: Path, processor: Path, settings: Settings) -> None:
        config = llava_config(checkpoint)
        self._settings = settings
        self._family = family_of(config)
        self._newline = load_newline(CheckpointWeights(checkpoint))
        self._pixel_values = PixelValues(processor, whole=self._family.takes_whole_pictures)
        side = int(config.vision_config.image_size)
        self._tile_tokens, width = features_shape(config, side)
        self.context_length = int(config.get_text_config().max_position_embeddings)
        """Tokens of a conversation at the most."""
        self.most_bytes = self.context_length * width * torch.float32.itemsize
        """Of the features of a turn's pictures at the most."""

    def look(self, item: bytes) -> LookedAt:
        """A picture as it was sent, checked without decoding it.

        Raises:
            SessionError: as `open_picture`.
        """
        return LookedAt(open_picture(item, self._settings), self)

    def decode(self, picture: OpenPicture) -> DecodedPicture:
        """A picture's tiles.

        Raises:
            SessionError: as `OpenPicture.decode`.
        """
        return DecodedPicture(self._pixel_values.of_open(picture), self)

    def num_tokens(self, tiles: Tiles) -> int:
        """Tokens of a picture."""
        return self._family.num_tokens(tiles.height, tiles.width, self._tile_tokens)

    def features(self, picture: Tiles, tiles: Tensor) -> Tensor:
        """Encoded tiles [N, T, D] of a picture -> its features [R, D], on the same device."""
        if self._newline is not None and self._newline.device != tiles.device:
            self._newline = self._newline.to(tiles.device)
        return self._family.rows(tiles, picture.height, picture.width, self._newline)


@dataclass(frozen=True)
class LookedAt:
    """See `llava_triton.pictures.encoding.Picture`."""

    picture: OpenPicture
    assembly: PictureAssembly

    @property
    def is_large(self) -> bool:
        """See `OpenPicture`."""
        return self.picture.is_large

    def decode(self) -> DecodedPicture:
        """See `PictureAssembly.decode`."""
        return self.assembly.decode(self.picture)


@dataclass(frozen=True)
class DecodedPicture:
    """See `llava_triton.pictures.encoding.Decoded`."""

    tiles: Tiles
    assembly: PictureAssembly

    @property
    def pixels(self) -> np.ndarray:
        """Float32 [N, 3, H, W]."""
        return self.tiles.pixels

    @property
    def tokens(self) -> int:
        """See `PictureAssembly.num_tokens`."""
        return self.assembly.num_tokens(self.tiles)

    def features(self, tiles: Tensor) -> Tensor:
        """See `PictureAssembly.features`."""
        return self.assembly.features(self.tiles, tiles)
