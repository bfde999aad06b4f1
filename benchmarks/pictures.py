"""Encoded pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture's file: PNG, or JPEG with its options."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int], grain: tuple[int, int], seed: int | list[int]) -> Image.Image:
    """Smooth colours, others for every seed: so many grains, enlarged to so many pixels.

    Args:
        size: width, height.
        grain: width, height.
        seed: of NumPy's generator.
    """
    width, height = grain
    small = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def large_jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A photograph's worth of detail, of that width and height, as JPEG."""
    width, height = size
    return encoded(noise(size, (width // 8, height // 8), seed), "JPEG", quality=90)
