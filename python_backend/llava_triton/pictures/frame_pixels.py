"""From a video's frames to the pixel values that the vision encoder takes.

As transformers' video processors compute with torchvision, which computes with torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.image_transforms import get_resize_output_image_size

from llava_triton.checkpoint.video_processor import VideoProcessor


class FramePixels:
    """A checkpoint's video processor.

    Args:
        processor: its numbers.
    """

    def __init__(self, processor: VideoProcessor) -> None:
        self._processor = processor
        # Fused as transformers fuses them: what is rounded otherwise differs in its last bits.
        scale = 1.0 / processor.scale
        self._mean = (torch.tensor(processor.mean) * scale).view(3, 1, 1)
        self._std = (torch.tensor(processor.std) * scale).view(3, 1, 1)

    def tile(self, frame: np.ndarray) -> np.ndarray:
        """A frame uint8 [H, W, 3] -> float32 [1, 3, S, S]."""
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
        size = self._size(frame)
        if size != frame.shape[:2]:
            mode = self._processor.mode
            pixels = interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)
        values = self._cropped(pixels).to(torch.float32).sub_(self._mean).div_(self._std)
        return values.contiguous().numpy()

    def _size(self, frame: np.ndarray) -> tuple[int, int]:
        """Height and width that a frame is scaled to."""
        if self._processor.size is not None:
            return self._processor.size
        height, width = get_resize_output_image_size(
            frame,
            self._processor.shortest_edge,
            default_to_square=False,
            input_data_format="channels_last",
        )
        return int(height), int(width)

    def _cropped(self, pixels: Tensor) -> Tensor:
        """The middle of [1, 3, H, W], with black around it where it is too small."""
        if self._processor.crop is None:
            return pixels
        height, width = self._processor.crop
        missing = [max(0, height - pixels.shape[-2]), max(0, width - pixels.shape[-1])]
        if any(missing):
            down, right = missing
            sides = (right // 2, (right + 1) // 2, down // 2, (down + 1) // 2)
            pixels = pad(pixels, sides)
        top = (pixels.shape[-2] - height) // 2
        left = (pixels.shape[-1] - width) // 2
        return pixels[..., top : top + height, left : left + width]
