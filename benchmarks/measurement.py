"""What a part of the benchmark measures, and how it hands that to the command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.workload import Workload


@dataclass(frozen=True)
class TurnTimes:
    """One answered turn. Times are in milliseconds."""

    session: int
    turn: int
    first_token_ms: float
    """From being given the question (and picture, encoded) to the first token."""
    between_tokens_ms: float | None
    """Mean over the answer, behind its first piece; None where all came in one."""
    output_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed again."""
    prompt_tokens: int
    """Of the whole prompt: everything said before, the picture, the question."""
    text: str
    """The answer: greedy, so all ways should say the same."""
    around_engine_ms: float = 0.0
    """Of the time to the first token, what passed before the engine had the turn and after it had
    the token: the way through Triton, where there is one."""


@dataclass(frozen=True)
class Load:
    """One way of answering under `sessions` sessions at once, from the first turn to the last."""

    sessions: int
    seconds: float
    peak_mib: float
    """Resident memory at its highest, of all processes that answer, from their start on."""
    turns: list[TurnTimes]
    device_peak_mib: float | None = None
    """Of the GPU's memory, what is in use when the last answer is there: allocators keep what they
    once had. Whoever uses it counts. None without a GPU."""

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens of all sessions over the whole time."""
        return sum(turn.output_tokens for turn in self.turns) / self.seconds

    def texts(self, session: int) -> list[str]:
        """A session's answers."""
        return [turn.text for turn in self.turns if turn.session == session]


def mean_gap_ms(first: float, last: float, tokens: int) -> float | None:
    """Milliseconds a token, from seconds at the first piece and at the last.

    Args:
        first: when the first piece came.
        last: when the last came.
        tokens: that came after the first piece.
    """
    return (last - first) * 1000.0 / tokens if tokens else None


def part_arguments(description: str) -> argparse.ArgumentParser:
    """The options that every part of the benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", type=Path, required=True, help="what `Workload.write` wrote")
    parser.add_argument("--sessions", type=int, nargs="+", required=True, help="ascending")
    parser.add_argument("--output", type=Path, required=True, help="where to write the loads")
    return parser


def read_loads(path: Path) -> list[Load]:
    """What `write_loads` wrote."""
    loads = []
    for values in json.loads(path.read_text()):
        turns = [TurnTimes(**turn) for turn in values.pop("turns")]
        loads.append(Load(**values, turns=turns))
    return loads


def write_loads(path: Path, loads: Iterable[Load]) -> None:
    """As JSON."""
    path.write_text(json.dumps([asdict(load) for load in loads], indent=1) + "\n")


def check_complete(load: Load, workload: Workload) -> Load:
    """The load, if every answer is there in its full length.

    Raises:
        RuntimeError: one is not, so that the figures would be wrong.
    """
    whole = [turn for turn in load.turns if turn.output_tokens == workload.answer_tokens]
    expected = load.sessions * workload.turns
    if len(whole) != expected or len(load.turns) != expected:
        raise RuntimeError(
            f"{len(load.turns)} answers, {len(whole)} of them with {workload.answer_tokens} "
            f"tokens, came at {load.sessions} sessions; {expected} should have"
        )
    return load


def run_loads(
    workload: Workload, sessions: Sequence[int], hold: Callable[[Workload, int], Load]
) -> list[Load]:
    """Hold every number of sessions, and say so."""
    loads = []
    for count in sessions:
        load = check_complete(hold(workload, count), workload)
        print(f"{count} at once: {load.tokens_per_second:.1f} tokens/s", flush=True)
        loads.append(load)
    return loads
