"""Our engine in this process: the encoder that the server runs in front, and nothing around it."""

from __future__ import annotations

import dataclasses
import json
import queue
import sys
import time
from pathlib import Path

import torch

from benchmarks.measurement import (
    Load,
    TurnTimes,
    mean_gap_ms,
    part_arguments,
    run_loads,
    write_loads,
)
from benchmarks.processes import device_memory_mib, this_process
from benchmarks.workload import Workload
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.contract.settings import Settings
from llava_triton.device import compute_dtype, default_device
from llava_triton.engine import Engine, TurnRequest
from llava_triton.model.runner import ModelRunner
from llava_triton.pictures.decode import PixelValues
from llava_triton.pictures.tower import vision_encoding

PATIENCE_SECONDS = 300.0
"""Nothing comes for so long: the engine hangs."""


def make_engine(repository: Path, dtype: str, weights: str = "unrounded") -> Engine:
    """The engine as `model_repository/language_model/1/model.py` makes it.

    Args:
        repository: the exported model repository.
        dtype: a value of `Settings.dtype`.
        weights: a value of `Settings.weights`.
    """
    settings = dataclasses.replace(Settings.of_repository(repository), dtype=dtype, weights=weights)
    device = default_device()
    checkpoint = load_checkpoint(
        repository / "language_model" / "1" / "checkpoint",
        dtype=compute_dtype(settings.dtype, device),
        device=device,
    )
    return Engine(ModelRunner(checkpoint, settings), checkpoint.tokenizer, settings)


class Encoder:
    """Encoded pictures to image features, by what the server uses for it."""

    def __init__(self, repository: Path) -> None:
        self._settings = Settings.of_repository(repository)
        self._pixels = PixelValues(repository / "image_encoder" / "1" / "processor")
        self._encode = vision_encoding(repository, self._settings)

    def features(self, picture: bytes) -> torch.Tensor:
        """Of one picture [T, D]."""
        features = self._encode(self._pixels.of_encoded([picture], self._settings))
        return torch.as_tensor(features)[0]


@dataclasses.dataclass
class Asked:
    """A turn on its way; its listener runs on the engine's thread and only takes notes."""

    session: int
    turn: int
    asked_at: float
    submitted_at: float
    finished: queue.SimpleQueue[Asked]
    events: list[tuple[float, Delta]] = dataclasses.field(default_factory=list)
    """When each piece came, and the piece."""
    error: SessionError | None = None

    def __call__(self, event: Delta | SessionError) -> None:
        """The listener."""
        if isinstance(event, SessionError):
            self.error = event
            self.finished.put(self)
            return
        if event.num_output_tokens:  # else only a sign of life
            self.events.append((time.monotonic(), event))
        if event.is_final:
            self.finished.put(self)

    def times(self) -> TurnTimes:
        """Of the complete answer."""
        if self.error is not None:
            raise self.error
        last, final = self.events[-1]
        first = self.submitted_at + final.first_token_ms / 1000.0
        return TurnTimes(
            session=self.session,
            turn=self.turn,
            first_token_ms=(first - self.asked_at) * 1000.0,
            between_tokens_ms=mean_gap_ms(first, last, final.num_output_tokens - 1),
            output_tokens=final.num_output_tokens,
            cached_tokens=final.num_cached_tokens,
            prompt_tokens=final.num_input_tokens,
            text="".join(delta.text for _, delta in self.events),
        )


class EngineLoad:
    """An engine with its encoder, and sessions that ask it."""

    def __init__(self, workload: Workload, weights: str = "unrounded") -> None:
        repository = Path(workload.repository)
        self._workload = workload
        self._encoder = Encoder(repository)
        self.engine = make_engine(repository, workload.dtype, weights)
        self._hold(0, 1, 2)

    def hold(self, workload: Workload, sessions: int) -> Load:
        """All at once; each asks again when its last answer is complete."""
        seconds, turns = self._hold(sessions, sessions, workload.turns)
        return Load(sessions, seconds, this_process().peak_mib, turns, device_memory_mib())

    def _hold(self, load: int, sessions: int, turns: int) -> tuple[float, list[TurnTimes]]:
        finished: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        pictures = [self._workload.picture(load, session) for session in range(sessions)]
        done: list[TurnTimes] = []
        began = time.monotonic()
        for session in range(sessions):
            self._ask(load, session, 0, turns, began, finished, pictures[session])
        while len(done) < sessions * turns:
            answered = finished.get(timeout=PATIENCE_SECONDS)
            done.append(answered.times())
            if answered.turn + 1 < turns:
                now = time.monotonic()
                self._ask(load, answered.session, answered.turn + 1, turns, now, finished, None)
        return time.monotonic() - began, done

    def _ask(
        self,
        load: int,
        session: int,
        turn: int,
        turns: int,
        asked_at: float,
        finished: queue.SimpleQueue[Asked],
        picture: bytes | None,
    ) -> None:
        features = () if picture is None else (self._encoder.features(picture),)
        request = TurnRequest(
            session_id=f"{load}-{session}",
            start=turn == 0,
            end=turn == turns - 1,
            text=self._workload.question(load, session, turn),
            image_features=features,
            sampling=SamplingParameters(max_tokens=self._workload.answer_tokens, ignore_eos=True),
        )
        asked = Asked(session, turn, asked_at, time.monotonic(), finished)
        self.engine.submit(request, asked)


def main() -> int:
    """The engine under the given loads, and then the fairness part if it is wanted."""
    parser = part_arguments(__doc__)
    parser.add_argument("--weights", default="unrounded", help="as in `Settings.weights`")
    parser.add_argument("--fairness", type=Path, help="measure this too, and write it there")
    options = parser.parse_args()
    workload = Workload.read(options.workload)
    load = EngineLoad(workload, options.weights)
    write_loads(options.output, run_loads(workload, options.sessions, load.hold))
    if options.fairness is not None:
        # Not at the top: it needs what is defined here.
        from benchmarks.fairness import measure_fairness

        measured = dataclasses.asdict(measure_fairness(load.engine, workload))
        options.fairness.write_text(json.dumps(measured, indent=2) + "\n")
    load.engine.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
