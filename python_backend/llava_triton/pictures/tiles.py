"""From a picture to the tiles that the vision encoder takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_triton.checkpoint.image_processor import load_image_processor
from llava_triton.pictures.decode import OpenPicture


class PixelValues:
    """A checkpoint's own image processor.

    Args:
        directory: holds the checkpoint's `preprocessor_config.json` or `processor_config.json`.
        whole: decode every picture at its full size, because its size decides its tiles.
    """

    def __init__(self, directory: Path, *, whole: bool = False) -> None:
        self._processor: Any = load_image_processor(directory)
        sizes = [each for each in dict(self._processor.size).values() if each]
        shrinks = self._processor.do_resize and sizes and not whole
        self._side = max(sizes) if shrinks else None

    def of_open(self, picture: OpenPicture) -> Tiles:
        """A picture -> its tiles. A photograph may be decoded at a smaller size first.

        Raises:
            SessionError: as `OpenPicture.decode`.
        """
        image = picture.decode(self._side)
        return Tiles(self.tiles(image), height=image.height, width=image.width)

    def tiles(self, image: Image.Image) -> np.ndarray:
        """An RGB picture of any size -> float32 [N, 3, H, W]: one tile, or several."""
        pixels = self._processor(images=[image], return_tensors="np")["pixel_values"]
        tiles = np.reshape(pixels, (-1, *np.shape(pixels)[-3:]))
        return np.ascontiguousarray(tiles, dtype=np.float32)


@dataclass(frozen=True)
class Tiles:
    """A decoded picture as the vision encoder takes it."""

    pixels: np.ndarray
    """Float32 [N, 3, H, W]."""
    height: int
    """Of the picture as it was decoded, upright; pixels."""
    width: int
