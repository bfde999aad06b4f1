"""Drawing tokens on a GPU: launches `sampling_kernels.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_triton.kernels.gpu import sampling_kernels


def draw_tokens(logits: Tensor, largest: Tensor, draws: Tensor, tokens: Tensor) -> None:
    """Draw a token of some rows of logits, in one launch; the others' tokens stay as they are.

    Sums are in float32: where the number drawn lies within their rounding of the border between two
    tokens, it may be the other one of them.

    Args:
        logits: float32 [N, V], contiguous.
        largest: float32 [N], of each row's logits; of a row in which it is not finite, the token
            has no meaning.
        draws: float32 [R, 6], on the device as the others: row, 1 / temperature in units of log 2
            (finite), top-k (0: none), top-p, log 2 of min-p, and the number drawn, from 0 to
            1 - 2^-23.
        tokens: int64 [N], written to.
    """
    assert logits.dtype == largest.dtype == draws.dtype == torch.float32
    assert tokens.dtype == torch.int64
    assert all(each.is_contiguous() for each in (logits, largest, draws, tokens))
    assert draws.shape[1] == sampling_kernels.FIELDS.value
    with torch.cuda.device_of(logits):
        sampling_kernels.draw[(len(draws),)](
            logits, largest, draws, tokens, VOCABULARY=logits.shape[1], num_warps=8
        )
