"""Decoded pictures of any colour mode -> RGB, as a person would see them."""

from __future__ import annotations

import numpy as np
from PIL import Image

_WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_STEPS = 257
"""65,535 / 255: shades of 16 bits to one of 8."""


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """The same picture in RGB.

    Grey of 16 bits keeps its shades (Pillow itself would show all above 255 as white), and what is
    transparent shows the background (Pillow would show whatever colour was left there).

    Args:
        image: decoded.
        background: `#rrggbb`.
    """
    if image.mode in _WIDE_GREY:
        shades = np.clip(np.asarray(image), 0, 65_535) // _STEPS
        return Image.fromarray(shades.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, background)
    rgb.paste(shown, mask=shown.getchannel("A"))
    return rgb
