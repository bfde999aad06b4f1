"""A piece of an answer, as the engine hands it out and the models send it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from llava_triton.contract.tensors import TensorSpec

FinishReason = Literal["", "stop", "length", "time_limit", "stopped", "prefilled", "closed"]
"""Why a turn ended: "" while it goes on; "stop": the model ended its answer or a stop string came;
"length": max_tokens or the context is used up; "time_limit": max_seconds have passed; "stopped": a
client wanted no more of the answer, and what there is of it is kept; "prefilled": a turn without
text has been computed and nothing was to be answered; "closed": the turn only closed its
session."""


@dataclass(frozen=True)
class Delta:
    """New text of an answer, with the turn's numbers so far.

    The last piece of a turn has a finish reason, and its numbers are the turn's. Each field is an
    output of the models: what clients, models and adapter send and read of it follows from here
    (`contract.answers`).
    """

    text: Annotated[str, TensorSpec("text_output", "BYTES")]
    finish_reason: Annotated[FinishReason, TensorSpec("finish_reason", "BYTES")]
    num_input_tokens: Annotated[int, TensorSpec("num_input_tokens", "INT32")]
    """Tokens of the whole prompt: everything said before, this turn's message, its images."""
    num_output_tokens: Annotated[int, TensorSpec("num_output_tokens", "INT32")]
    """Tokens generated so far."""
    num_cached_tokens: Annotated[int, TensorSpec("num_cached_tokens", "INT32")]
    """Prompt tokens that were not computed again."""
    first_token_ms: Annotated[float, TensorSpec("first_token_ms", "FP32")]
    """Milliseconds from the turn's arrival in the engine to its first token; 0 without one."""
    num_forgotten_turns: Annotated[int, TensorSpec("num_forgotten_turns", "INT32")] = field(
        default=0, kw_only=True
    )
    """Answered questions of the conversation that the prompt lacks, because the context was full;
    see `SamplingParameters.truncation`."""
    logprobs: Annotated[tuple[str, ...], TensorSpec("logprobs", "BYTES", (-1,))] = field(
        default=(), kw_only=True
    )
    """Where the turn asks for them: of each new token a JSON object, {"token": text, "logprob":
    number, "bytes": numbers, "top_logprobs": [the same of the likeliest tokens]}."""

    @property
    def is_final(self) -> bool:
        """Whether the turn ends with this piece."""
        return self.finish_reason != ""
