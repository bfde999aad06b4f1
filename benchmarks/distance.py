"""How far from what the hardware allows each row of the benchmark is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.findings import table
from benchmarks.limits import (
    Limits,
    decode_step_bytes,
    head_weights,
    prefill_flops,
    vision_flops,
)
from benchmarks.report import Row

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a weight, key or value."""
BYTES_OF_ROUNDED = {"int8": 1, "int4": 35 / 64}
"""Of a layer's weight. For every 128 of 4 bits there are a scale of 4 bytes and a zero point of 2.
"""


@dataclass(frozen=True)
class Ceiling:
    """What a checkpoint could do at the rates that were measured in the same run."""

    config: Any
    """Of the whole LLaVA, as transformers has it."""
    limits: Mapping[str, Limits]
    """By dtype; float32 among them on a CPU."""

    @property
    def memory(self) -> Limits:
        """Those with the highest rate: the memory is the same for every dtype."""
        return max(self.limits.values(), key=lambda limit: limit.memory_bytes_per_second)

    def decode_ms(
        self, dtype: str, sessions: int, context: float, *, weights: str = "unrounded"
    ) -> float:
        """One step for all sessions: weights, keys and values read once.

        Args:
            dtype: of all of them.
            sessions: in the batch.
            context: tokens that each attends to.
            weights: how the layers keep theirs, as in `Settings.weights`.
        """
        each = BYTES_OF_ROUNDED.get(weights, BYTES[dtype])
        size = decode_step_bytes(
            self.config.text_config,
            [context] * sessions,
            bytes_per_weight=each,
            bytes_per_value=BYTES[dtype],
        )
        # The last matrix is none of a layer, and not rounded.
        size += head_weights(self.config.text_config) * (BYTES[dtype] - each)
        return 1000.0 * size / self.memory.memory_bytes_per_second

    def opening_ms(self, dtype: str, sessions: int, prompt_tokens: float) -> float:
        """Until half of the sessions that open at once have their first token.

        The products for one opening are those of the vision encoder (in float32 on a CPU, as it is
        served there) and of the prompt. Of openings that take equal time, half are ready at the
        earliest when (sessions + 1) / 2 could be computed one after the other.
        """
        limit = self.limits[dtype]
        for_pictures = limit if limit.threads is None else self.limits["float32"]
        picture = vision_flops(self.config) / for_pictures.matrix_flops_per_second
        prompt = prefill_flops(self.config.text_config, round(prompt_tokens))
        one = picture + prompt / limit.matrix_flops_per_second
        return 1000.0 * one * (sessions + 1) / 2


@dataclass(frozen=True)
class Distance:
    """One row's times beside their limits; a share of 1 is the limit."""

    way: str
    title: str
    sessions: int
    mean_context: float
    """Tokens that a session attends to, over all its steps."""
    decode_ms: float
    """Between two tokens of an answer."""
    decode_limit_ms: float
    decode_share: float
    """Limit / measured."""
    opening_ms: float
    """To the first token of the first turn."""
    opening_limit_ms: float
    opening_share: float


def distances(
    rows: Sequence[Row], dtypes: Mapping[str, str], weights: Mapping[str, str], ceiling: Ceiling
) -> list[Distance]:
    """One for every row.

    Args:
        rows: what was measured.
        dtypes: of the ways, by their names.
        weights: how their layers keep them, by their names.
        ceiling: what would be possible.
    """
    made = []
    for row in rows:
        dtype = dtypes[row.way]
        decode = ceiling.decode_ms(dtype, row.sessions, row.mean_context, weights=weights[row.way])
        opening = ceiling.opening_ms(dtype, row.sessions, row.opening_tokens)
        made.append(
            Distance(
                way=row.way,
                title=row.title,
                sessions=row.sessions,
                mean_context=row.mean_context,
                decode_ms=row.between_tokens_ms,
                decode_limit_ms=decode,
                decode_share=decode / row.between_tokens_ms,
                opening_ms=row.first_token_first_turn_ms,
                opening_limit_ms=opening,
                opening_share=opening / row.first_token_first_turn_ms,
            )
        )
    return made


def distance_text(far: Sequence[Distance], ceiling: Ceiling) -> str:
    """The rates, and a table."""
    heads = ["", "way", "sessions", "mean context"]
    heads += ["between tokens, ms: limit", "measured", "of it"]
    heads += ["1st token, 1st turn, ms: limit", "measured", "of it"]
    rows = [
        (
            *(each.way, each.title, str(each.sessions), f"{each.mean_context:.0f}"),
            *(f"{each.decode_limit_ms:.2f}", f"{each.decode_ms:.2f}", f"{each.decode_share:.1%}"),
            f"{each.opening_limit_ms:.1f}",
            *(f"{each.opening_ms:.1f}", f"{each.opening_share:.1%}"),
        )
        for each in far
    ]
    return f"{table(heads, rows)}\n{_rates_text(ceiling)}"


def _rates_text(ceiling: Ceiling) -> str:
    memory = ceiling.memory
    rates = ", ".join(
        f"{limit.matrix_flops_per_second / 1e9:,.0f} in {dtype}"
        for dtype, limit in ceiling.limits.items()
    )
    text = f"""\
Limits, by the best rates of this run. Memory: {memory.memory_bytes_per_second / 1e9:,.1f} GB/s \
(reading {memory.read_bytes_per_second / 1e9:,.1f}, copying \
{memory.copy_bytes_per_second / 1e9:,.1f});
matrix products, GFLOP/s: {rates}. Between tokens: all weights and the
sessions' keys and values are read once. 1st token of the 1st turn: the products of the vision
encoder and of the prompt; where several sessions open at once, until half of them could have it.
What is measured includes everything else: decoding the picture, sampling, questions of other
sessions computed between two tokens, the queue, and the way through Triton where there is one.
"""
    if memory.host_copy_bytes_per_second and memory.to_host_bytes_per_second:
        text += (
            f"Copies between pinned host memory and the GPU: "
            f"{memory.host_copy_bytes_per_second / 1e9:,.1f} GB/s to it, "
            f"{memory.to_host_bytes_per_second / 1e9:,.1f} from it.\n"
        )
    return text
