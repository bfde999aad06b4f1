"""Log probabilities of chosen tokens and of the likeliest ones, for turns that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llava_triton.device import to_device, to_host


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model made of one token, before anything changed its logits."""

    logprob: float
    """Of the token that was chosen, by the natural logarithm."""
    top: tuple[tuple[int, float], ...]
    """Token IDs and log probabilities of the likeliest ones, these first."""


class AskedLogprobs:
    """Those of one step's rows that ask for them; costs nothing where none does.

    Args:
        logits: [N, V]; what is needed of them is copied.
        asked: N; of how many likeliest tokens, None: no log probabilities.
    """

    def __init__(self, logits: Tensor, asked: Sequence[int | None]) -> None:
        self._asked = asked
        rows = [row for row, most in enumerate(asked) if most is not None]
        self._most = min(max((most or 0 for most in asked), default=0), logits.shape[1])
        self._logprobs: Tensor | None = None
        if rows:
            self._rows = to_device(np.array(rows), logits.device)
            self._logprobs = logits[self._rows].float().log_softmax(-1)

    def of(self, tokens: Tensor) -> Callable[[], list[TokenLogprobs | None]]:
        """Look the chosen tokens up; waits for nothing.

        Args:
            tokens: int64 [N]; where one is below 0, what is told of its row has no meaning.

        Returns:
            What gives each row's; to be called when the device is done, by any thread.
        """
        if self._logprobs is None:
            return lambda: [None] * len(self._asked)
        chosen = tokens[self._rows].clamp(min=0)[:, None]
        values, ids = self._logprobs.topk(self._most)
        told = [to_host(each) for each in (self._logprobs.gather(-1, chosen), values, ids)]

        def look() -> list[TokenLogprobs | None]:
            found = zip(*(each.tolist() for each in told), strict=True)
            return [
                None if most is None else _token_logprobs(most, *next(found))
                for most in self._asked
            ]

        return look


def _token_logprobs(
    most: int, chosen: list[float], values: list[float], ids: list[int]
) -> TokenLogprobs:
    return TokenLogprobs(chosen[0], tuple(zip(ids[:most], values[:most], strict=True)))
