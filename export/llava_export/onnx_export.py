"""A vision encoder as an ONNX graph."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from llava_triton.checkpoint.vision_tower import VisionEncoder
from llava_triton.contract.models import ENCODED, PIXEL_VALUES

_SINGLE_FILE_BYTES = 1_900_000_000
"""A protobuf message, which an ONNX file is, must stay below 2 GiB; larger weights go beside it."""


def export_onnx(encoder: VisionEncoder, image_size: int, path: Path) -> None:
    """Write `encoder` to `path`, with a dynamic batch.

    Input `pixel_values` [batch, 3, image_size, image_size], output `image_features` [batch, T, D];
    both float32. Weights of 2 GB and more go to a file beside it, `<path>.data`.
    """
    # Two pictures: an example batch of one would be taken for a constant.
    pixels = torch.zeros(2, 3, image_size, image_size)
    weight_bytes = sum(weight.nbytes for weight in encoder.parameters())
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports every absent optional package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder,
                (pixels,),
                dynamo=True,
                input_names=[PIXEL_VALUES.name],
                output_names=[ENCODED.name],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=weight_bytes > _SINGLE_FILE_BYTES)
    finally:
        logger.setLevel(level)
