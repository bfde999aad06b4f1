"""Choosing the next token from the model's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_triton.sampling_parameters import SamplingParameters

__all__ = ["Sampler", "SamplingParameters"]


class Sampler:
    """Draws one turn's tokens.

    Each turn has a random generator of its own, and draws one number per token on the CPU: the
    same seed and logits give the same tokens on any device, whatever other turns do meanwhile.

    Args:
        parameters: the turn's.
    """

    def __init__(self, parameters: SamplingParameters) -> None:
        self._parameters = parameters
        self._generator = torch.Generator()
        if parameters.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(parameters.seed)

    def sample(self, logits: Tensor) -> int:
        """The next token's ID.

        Args:
            logits: [V], any float dtype; -inf rules a token out.
        """
        if self._parameters.temperature == 0.0:
            return int(logits.argmax())
        probabilities, ids = kept_tokens(logits, self._parameters)
        cumulative = probabilities.cumsum(0)
        draw = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        position = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
        # A draw a rounding error below 1 can land behind the last token.
        return int(ids[min(position, len(ids) - 1)])


def kept_tokens(logits: Tensor, parameters: SamplingParameters) -> tuple[Tensor, Tensor]:
    """The tokens that temperature, top-k and then top-p leave to be sampled from.

    Top-p looks at the probabilities after top-k, as vLLM and transformers do.

    Args:
        logits: [V].
        parameters: with a temperature above 0.

    Returns:
        Probabilities [K] float64, likeliest first, not normalized again; token IDs [K].
    """
    # float64: the smallest temperatures would be 0 in float32. The maximum is subtracted first so
    # that they overflow downwards only.
    values, ids = logits.double().sort(descending=True, stable=True)
    if parameters.top_k:
        values, ids = values[: parameters.top_k], ids[: parameters.top_k]
    probabilities = ((values - values[0]) / parameters.temperature).softmax(0)
    before = probabilities.cumsum(0) - probabilities
    keep = max(1, int((before < parameters.top_p).sum()))
    # Tokens of probability 0 must never be drawn.
    keep = min(keep, max(1, int((probabilities > 0).sum())))
    return probabilities[:keep], ids[:keep]
