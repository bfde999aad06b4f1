"""A stage of `make gpu-check`: transformers, stateless and with a kept cache."""

from __future__ import annotations

import statistics
import sys

from benchmarks.gpu_check.stage import Options, run_stage
from benchmarks.load import hold
from benchmarks.references import Transformers, TransformersWay
from benchmarks.workload import Workload

ANSWER_TOKENS = 64
"""At most: transformers is slow."""


def measure(options: Options) -> None:
    """The stage."""
    place, sizes, findings = options.place, options.place.sizes, options.findings
    workload = Workload(
        str(options.checkpoint),
        "none",
        turns=sizes.baseline_turns,
        question_tokens=sizes.question_tokens,
        answer_tokens=min(ANSWER_TOKENS, sizes.answer_tokens),
        dtype=place.dtype_name,
    )

    def way(name: str, title: str, kept: bool) -> None:
        reference = Transformers(options.checkpoint, place.device, place.dtype)
        baseline = TransformersWay(reference, kept=kept)
        hold(baseline, workload, 0, 1, 2)  # warms up
        load = hold(baseline, workload, 1, 1, workload.turns)
        turns = [turn for turn in load.turns if turn.turn > 0]
        later = statistics.median(turn.first_token_ms for turn in turns)
        gaps = [turn.between_tokens_ms for turn in turns if turn.between_tokens_ms is not None]
        between = statistics.median(gaps)
        findings.add(f"{name}_later_ms", later, f"{title}: later turn's first token {later:.1f} ms")
        findings.add(f"{name}_between_ms", between, f"  between tokens {between:.2f} ms")

    # One after the other: each has a model of its own.
    findings.attempt("kept cache", lambda: way("K", "kept cache", True))
    findings.attempt("stateless", lambda: way("S", "stateless", False))


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
