"""Choosing the next tokens from the model's logits, where the logits are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.device import to_device

__all__ = ["NO_TOKEN", "Draw", "Draws", "SamplingParameters", "next_tokens"]

LOWEST_TEMPERATURE = 1e-30
MOST_DRAWN = 1.0 - 2.0**-23
"""Times a sum in float32 it is less than the sum."""
NO_TOKEN = -1
"""In the place of a token's ID, where the logits are not finite."""


@dataclass(frozen=True)
class Draw:
    """How one token is to be drawn."""

    temperature: float
    """Above 0."""
    top_k: int
    """0: no limit."""
    top_p: float
    number: float
    """From 0 to 1, 1 excluded: which token it will be."""
    min_p: float = 0.0
    """0: no limit."""


class Draws:
    """What decides one turn's tokens, beside their logits.

    Each turn has a random generator of its own, on the CPU, and one number a token: the same seed
    and logits give the same tokens on any device, whatever other turns do meanwhile, also where a
    step has to be computed once more.

    Args:
        parameters: the turn's.
    """

    def __init__(self, parameters: SamplingParameters) -> None:
        self._parameters = parameters
        self._numbers: list[float] = []
        self._generator = torch.Generator()
        if parameters.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(parameters.seed)

    def at(self, position: int) -> Draw | None:
        """Of the answer's token with this index; None where it is the likeliest one."""
        parameters = self._parameters
        if parameters.temperature == 0.0:
            return None
        while len(self._numbers) <= position:
            number = torch.rand((), generator=self._generator, dtype=torch.float64)
            self._numbers.append(float(number))
        return Draw(
            parameters.temperature,
            parameters.top_k,
            parameters.top_p,
            self._numbers[position],
            parameters.min_p,
        )


def next_tokens(logits: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """One token ID a row, int64 [N] where the logits are; waits for nothing.

    `NO_TOKEN` where a row's largest logit is not finite: one is NaN or infinite, or all are ruled
    out.

    Args:
        logits: [N, V], any float dtype; -inf rules a token out.
        draws: N; None takes the likeliest token.
    """
    largest, tokens = logits.max(-1)
    drawn = [(row, draw) for row, draw in enumerate(draws) if draw is not None]
    if drawn and logits.device.type == "cuda":
        from llava_triton.kernels.gpu.sampling import draw_tokens

        draw_tokens(logits, largest, to_device(gpu_draws(drawn), logits.device), tokens)
    elif drawn:
        rows = to_device(np.array([row for row, _ in drawn]), logits.device)
        tokens[rows] = _drawn(logits[rows], [draw for _, draw in drawn])
    return torch.where(largest.isfinite(), tokens, NO_TOKEN)


def gpu_draws(
    drawn: Sequence[tuple[int, Draw]],
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows and how their tokens are drawn, as `kernels.gpu.sampling.draw_tokens` takes them.

    Temperatures that float32 cannot divide by become so low a one that it is the likeliest token
    or, of several, one of them.
    """
    table = [
        (
            row,
            1.0 / max(draw.temperature, LOWEST_TEMPERATURE) / math.log(2.0),
            draw.top_k,
            draw.top_p,
            math.log2(draw.min_p) if draw.min_p > 0.0 else -math.inf,
            min(draw.number, MOST_DRAWN),
        )
        for row, draw in drawn
    ]
    return np.array(table, dtype=np.float32)


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[N, V] -> int64 [N]."""
    probabilities, ids = kept_tokens(logits, draws)
    cumulative = probabilities.cumsum(-1)
    places = _column(logits, [draw.number for draw in draws]) * cumulative[:, -1:]
    positions = torch.searchsorted(cumulative, places, right=True)
    # A draw a rounding error below 1 can land behind the last token. (Logits that are no numbers
    # leave none; on a GPU an index below 0 would be the end of every session.)
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return ids.gather(-1, positions.minimum(last)).squeeze(-1)


def kept_tokens(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """The tokens that temperature, min-p, top-k and then top-p leave to be sampled from.

    Top-p looks at the probabilities after min-p and top-k, as vLLM does.

    Args:
        logits: [N, V].
        draws: N; their numbers do not matter here.

    Returns:
        Probabilities [N, V] float64, likeliest first, 0 for the tokens ruled out (at least one is
        not), not normalized again; token IDs [N, V].
    """
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    # float64: the smallest temperatures would be 0 in float32. The maximum is subtracted first so
    # that they overflow downwards only.
    values = values.double()
    scaled = (values - values[:, :1]) / _column(logits, [draw.temperature for draw in draws])
    least = _column(logits, [draw.min_p for draw in draws]).log()  # of 0 it is below all
    scaled = scaled.masked_fill(scaled < least, -torch.inf)
    most = _column(logits, [draw.top_k or torch.inf for draw in draws])
    probabilities = scaled.masked_fill(ranks >= most, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    enough = before < _column(logits, [draw.top_p for draw in draws])
    keep = enough.sum(-1, keepdim=True).clamp(min=1)
    return probabilities.masked_fill(ranks >= keep, 0.0), ids


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """float64 [N, 1] on the device of `like`."""
    return to_device(np.array(values, dtype=np.float64), like.device)[:, None]
