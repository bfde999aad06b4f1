"""Image features on their way between the models: float32 [N, T, D] as bytes [4 N T D].

Why: see `protocol.IMAGE_FEATURES`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_triton.errors import invalid


def flattened(features: Tensor) -> Tensor:
    """Features float32 [N, T, D] -> uint8 [4 N T D], on the same device, without a copy where they
    lie in one piece."""
    return features.contiguous().flatten().view(torch.uint8)


def unflattened(flat: Tensor, tokens: int, width: int, most: int) -> Tensor | None:
    """A copy float32 [N, T, D] of features that were flattened; None where there is none.

    Args:
        flat: uint8 [4 N T D] on any device, in memory that may be taken back.
        tokens: T.
        width: D.
        most: pictures that a turn takes.

    Raises:
        SessionError: INVALID_ARG, another size.
    """
    one = tokens * width * torch.float32.itemsize
    pictures, rest = divmod(flat.numel(), one)
    if rest or pictures > most or flat.dtype != torch.uint8 or flat.dim() != 1:
        raise invalid(
            f"image_features has {flat.numel()} bytes; it takes {one} a picture ({tokens} tokens "
            f"of {width} numbers of float32), of up to {most} pictures"
        )
    # Copied first: the memory that it comes in need not be aligned.
    return flat.clone().view(torch.float32).view(pictures, tokens, width) if pictures else None
