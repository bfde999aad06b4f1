"""Image features on their way between the models: the rows of all pictures, and how many each has.

Rows are float32 [R, D] as bytes [4 R D], lengths are int32 [N] as bytes [4 N]. Why bytes: see
`contract.models.IMAGE_FEATURES`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llava_triton.contract.errors import invalid


def flattened(pictures: Sequence[Tensor]) -> tuple[Tensor, np.ndarray]:
    """Features float32 [T, D] of each of at least one picture -> rows uint8 [4 R D], on the same
    device, and lengths uint8 [4 N]."""
    rows = torch.cat(list(pictures)).flatten().view(torch.uint8)
    return rows, np.array([len(each) for each in pictures], dtype="<i4").view(np.uint8)


def unflattened(rows: Tensor, lengths: np.ndarray, width: int, most: int) -> tuple[Tensor, ...]:
    """A copy of features that were flattened, float32 [T, D] each.

    Args:
        rows: uint8 [4 R D] on any device, in memory that may be taken back.
        lengths: uint8 [4 N].
        width: D.
        most: pictures that a turn takes.

    Raises:
        SessionError: INVALID_ARG, another size.
    """
    if lengths.dtype != np.uint8 or lengths.ndim != 1 or lengths.size % 4:
        raise invalid(
            f"image_lengths has {lengths.size} bytes; it takes 4 a picture, the number of its "
            "tokens as an integer of 32 bits"
        )
    tokens = [int(each) for each in np.ascontiguousarray(lengths).view("<i4")]
    if len(tokens) > most or any(each < 1 for each in tokens):
        raise invalid(
            f"image_lengths holds {len(tokens)} numbers, the least {min(tokens)}; it takes at "
            f"least 1 token a picture, of up to {most} pictures"
        )
    one = width * torch.float32.itemsize
    if rows.numel() != sum(tokens) * one or rows.dtype != torch.uint8 or rows.dim() != 1:
        raise invalid(
            f"image_features has {rows.numel()} bytes; it takes {one} a token ({width} numbers of "
            f"float32), and image_lengths speaks of {sum(tokens)} tokens"
        )
    if not tokens:
        return ()
    # Copied first: the memory that it comes in need not be aligned.
    copy = rows.clone().view(torch.float32).view(-1, width)
    return tuple(torch.split(copy, tokens))
