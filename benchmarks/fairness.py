"""Do running answers stall while a long prompt is computed? With our engine in this process."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import PATIENCE_SECONDS, Answer, Ask, Way, exactly
from benchmarks.report import percentile_95
from benchmarks.workload import Workload
from llava_triton.contract.settings import Settings

QUIET_SHARE = 0.3
"""The long prompt comes when this share of every answer is there."""


@dataclass(frozen=True)
class Fairness:
    """Intervals between the pieces that a stream gets, in milliseconds."""

    streams: int
    prompt_tokens: int
    """Of the long prompt."""
    usual_ms: float
    """Median over all streams before the long prompt came."""
    usual_largest_ms: float
    """The largest before it came: what the machine does by itself."""
    stalled_median_ms: float
    """Median over all streams from its coming to its first token."""
    stalled_95_ms: float
    """95th percentile of the same."""
    stalled_largest_ms: float
    """The largest of any stream that touches that time."""
    prompt_first_token_ms: float
    """From the long prompt's coming to its first token."""
    target_ms: float
    """That the engine was given for the time between two tokens."""
    largest_piece_tokens: int
    """Tokens in one piece at most; above 1, an interval is one of several tokens."""


def measure_fairness(way: Way, workload: Workload) -> Fairness:
    """`workload.streams` long answers run; then a session with one long prompt comes.

    Args:
        way: an engine in this process.
        workload: how many, and how long.

    Raises:
        RuntimeError: an answer ended before the long prompt's first token: the answers are too
            short to tell anything.
    """

    def ask(name: str, prompt_tokens: int, answer_tokens: int) -> Answer:
        text, sampling = workload.text(prompt_tokens, name), exactly(answer_tokens)
        return way.ask(Ask(f"fairness {name}", True, True, text, sampling=sampling))

    streams = [
        ask(f"stream {number}", workload.question_tokens, workload.stream_tokens)
        for number in range(workload.streams)
    ]
    enough = int(workload.stream_tokens * QUIET_SHARE)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while min(_tokens(stream) for stream in streams) < enough and time.monotonic() < deadline:
        time.sleep(0.02)
    late = ask("long prompt", workload.prompt_tokens, 2)
    for answer in [late, *streams]:
        answer.wait()
    return summarize_fairness(
        [[when for when, _ in stream.events] for stream in streams],
        late.submitted_at,
        late.engines_first_token_at,
        prompt_tokens=late.done.num_input_tokens,
        target_ms=Settings.of_repository(Path(workload.repository)).target_between_tokens_ms,
        largest_piece=max(_largest_piece(stream) for stream in streams),
    )


def summarize_fairness(
    streams: Sequence[Sequence[float]],
    came: float,
    computed: float,
    *,
    prompt_tokens: int,
    target_ms: float,
    largest_piece: int,
) -> Fairness:
    """Intervals from the times, in seconds, at which every stream got its pieces.

    Args:
        streams: those times.
        came: when the long prompt came.
        computed: when it had its first token.
        prompt_tokens: of the long prompt.
        target_ms: that the engine was given for the time between two tokens.
        largest_piece: tokens in one piece at most.
    """
    if min(times[-1] for times in streams) < computed:
        raise RuntimeError("an answer ended before the long prompt was computed; make them longer")
    before: list[float] = []
    during: list[float] = []
    for times in streams:
        for start, end in itertools.pairwise(times):
            if end <= came:
                before.append((end - start) * 1000.0)
            elif start < computed:
                during.append((end - start) * 1000.0)
    return Fairness(
        streams=len(streams),
        prompt_tokens=prompt_tokens,
        usual_ms=statistics.median(before),
        usual_largest_ms=max(before),
        stalled_median_ms=statistics.median(during),
        stalled_95_ms=percentile_95(during),
        stalled_largest_ms=max(during),
        prompt_first_token_ms=(computed - came) * 1000.0,
        target_ms=target_ms,
        largest_piece_tokens=largest_piece,
    )


def _tokens(stream: Answer) -> int:
    return stream.events[-1][1].num_output_tokens if stream.events else 0


def _largest_piece(stream: Answer) -> int:
    counts = [0, *(delta.num_output_tokens for _, delta in stream.events)]
    return max(after - before for before, after in itertools.pairwise(counts))
