"""What changes the model's logits before a token is chosen by them: bans, biases and penalties.

Nothing is kept on the device between two steps. What a turn has said goes along with each of its
steps, and a token that is not known yet is named by `token_after`. So a step that is computed once
more, or a turn that was put back, finds the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.device import to_device

TokenIds: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Biases: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Bits: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


def _no_ids() -> TokenIds:
    return np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Penalties:
    """See `SamplingParameters`."""

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0


@dataclass(frozen=True, eq=False)
class LogitsChange:
    """How one row of logits is changed: what is not allowed first, then biases, then penalties, as
    in vLLM."""

    allowed: Callable[[], Bits] | None = None
    """Gives a bit for each token, the first one the lowest: whether it may come. Is called when the
    device is computing the logits."""
    bias: tuple[TokenIds, Biases] | None = None
    """Token IDs, each once, and what is added to their logits: -inf rules a token out."""
    penalties: Penalties | None = None
    answer: TokenIds = field(default_factory=_no_ids)
    """The answer's tokens so far, or what `token_after` gives; only where there are penalties."""
    prompt: TokenIds = field(default_factory=_no_ids)
    """Those of the conversation before; only where there is a penalty for repetition."""


class LogitsProcessors:
    """How one turn's logits are changed, token by token.

    Args:
        parameters: the turn's.
        eos_token_ids: that end an answer.
        allowed: see `LogitsChange`; is called for each token anew.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        eos_token_ids: frozenset[int],
        allowed: Callable[[], Bits] | None = None,
    ) -> None:
        self._allowed = allowed
        ends = set(parameters.stop_token_ids)
        if not parameters.ignore_eos:
            ends |= eos_token_ids
        self._min_tokens = parameters.min_tokens
        bias = dict(parameters.logit_bias)
        self._bias = _biases(bias)
        self._bias_before_end = _biases(bias | dict.fromkeys(ends, -np.inf))
        self._penalties = Penalties(
            parameters.frequency_penalty,
            parameters.presence_penalty,
            parameters.repetition_penalty,
        )
        self._prompt: TokenIds | None = None

    def at(
        self, tokens: Sequence[int], prompt_tokens: int, ahead: Sequence[int]
    ) -> LogitsChange | None:
        """Of the token behind all of these; None where nothing is changed.

        Args:
            tokens: of the whole conversation.
            prompt_tokens: how many of them come before the answer; always the same.
            ahead: tokens behind them that are not known yet, as `token_after` names them.
        """
        answer_tokens = len(tokens) - prompt_tokens + len(ahead)
        bias = self._bias_before_end if answer_tokens < self._min_tokens else self._bias
        penalties = self._penalties
        if penalties == Penalties():
            if bias is None and self._allowed is None:
                return None
            return LogitsChange(self._allowed, bias)
        answer = np.array([*tokens[prompt_tokens:], *ahead], dtype=np.int64)
        prompt = _no_ids()
        if penalties.repetition != 1.0:
            if self._prompt is None:
                self._prompt = np.unique(np.array(tokens[:prompt_tokens], dtype=np.int64))
            prompt = self._prompt
        return LogitsChange(self._allowed, bias, penalties, answer, prompt)


def _biases(
    bias: dict[int, float],
) -> tuple[TokenIds, Biases] | None:
    if not bias:
        return None
    return np.array([*bias], dtype=np.int64), np.array([*bias.values()], dtype=np.float32)


def process_logits(
    logits: Tensor,
    changes: Sequence[LogitsChange | None],
    known: Callable[[Tensor], Tensor] = lambda ids: ids,
) -> None:
    """Change logits in place; waits for nothing, and costs nothing where nothing is changed.

    Args:
        logits: float32 [N, V].
        changes: N.
        known: token IDs, or what `token_after` gives -> token IDs, where the logits are.
    """
    rows = [(row, change) for row, change in enumerate(changes) if change is not None]
    bounded = [(row, change.allowed) for row, change in rows if change.allowed is not None]
    if bounded:
        _rule_out(logits, bounded)
    biased = [(row, *change.bias) for row, change in rows if change.bias is not None]
    if biased:
        _add_biases(logits, biased)
    penalized = [(row, change) for row, change in rows if change.penalties is not None]
    if penalized:
        _penalize(logits, penalized, known)


def _rule_out(logits: Tensor, bounded: Sequence[tuple[int, Callable[[], Bits]]]) -> None:
    at = to_device(np.array([row for row, _ in bounded]), logits.device)
    bits = to_device(np.stack([allowed() for _, allowed in bounded]), logits.device)
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    each = (bits[..., None] >> shifts & 1).flatten(1)[:, : logits.shape[1]]
    logits[at] = logits[at].masked_fill(each == 0, -torch.inf)


def _add_biases(logits: Tensor, biased: Sequence[tuple[int, TokenIds, Biases]]) -> None:
    index = _row_of_each([(row, ids) for row, ids, _ in biased], logits)
    ids = to_device(np.concatenate([ids for _, ids, _ in biased]), logits.device)
    values = to_device(np.concatenate([values for _, _, values in biased]), logits.device)
    logits[index, ids] += values


def _penalize(
    logits: Tensor,
    penalized: Sequence[tuple[int, LogitsChange]],
    known: Callable[[Tensor], Tensor],
) -> None:
    at = to_device(np.array([row for row, _ in penalized]), logits.device)
    table = [astuple(change.penalties or Penalties()) for _, change in penalized]
    numbers = np.array(table, dtype=np.float32)
    frequency, presence, repetition = to_device(numbers, logits.device).T[..., None]
    found = logits[at]
    said = _counts(logits, [change.answer for _, change in penalized], known)
    if (numbers[:, 2] != 1.0).any():
        before = _counts(logits, [change.prompt for _, change in penalized], known)
        repeated = torch.where(found > 0, found / repetition, found * repetition)
        found = torch.where(said + before > 0, repeated, found)
    if numbers[:, :2].any():
        found = found - (frequency * said + presence * (said > 0))
    logits[at] = found


def _row_of_each(rows: Sequence[tuple[int, TokenIds]], like: Tensor) -> Tensor:
    """The row that each of the token IDs is for, where `like` is."""
    numbers = [row for row, _ in rows]
    return to_device(np.repeat(numbers, [len(ids) for _, ids in rows]), like.device)


def _counts(like: Tensor, ids: Sequence[TokenIds], known: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each token is among the IDs, int32 [len(ids), V]."""
    vocabulary = like.shape[1]
    counts = torch.zeros(len(ids), vocabulary, dtype=torch.int32, device=like.device)
    rows = _row_of_each(list(enumerate(ids)), like)
    given = np.concatenate(ids)
    tokens = to_device(given, like.device)
    if (given < 0).any():
        tokens = known(tokens)
    ones = torch.ones_like(tokens, dtype=torch.int32)
    counts.view(-1).scatter_add_(0, rows * vocabulary + tokens, ones)
    return counts
