"""What is asked, written out for processes that have none of our libraries: no torch, no
transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.workload import Workload

WARM_UP = (0, 1)
"""Number of the part of a run that comes first, and its sessions; see `load.hold_all`."""


def turn_text(question: str, *, start: bool, image_tokens: int = 1) -> str:
    """A turn's message as the checkpoints' chat template renders it.

    Args:
        question: of the turn.
        start: whether the turn opens the session, and so comes with the picture; else it ends the
            answer before it, too.
        image_tokens: how often the picture's placeholder is to stand there.
    """
    opening = "<s>USER: " + "<image>" * image_tokens + "\n" if start else "</s>USER: "
    return f"{opening}{question} ASSISTANT:"


@dataclass(frozen=True)
class Script:
    """A workload with all its pictures and questions: see `load.Asked`."""

    checkpoint: str
    """Directory of the checkpoint."""
    dtype: str
    """That the answers are computed in; "auto": the peer decides."""
    turns: int
    answer_tokens: int
    pictures: dict[str, str]
    """Files, by `_key`."""
    questions: dict[str, list[str]]
    """Of all turns, by `_key`."""

    @classmethod
    def of_workload(cls, workload: Workload, dtype: str, sessions: Iterable[int]) -> Script:
        """Writes the pictures beside the checkpoint.

        Args:
            workload: what is asked.
            dtype: as in `dtype`.
            sessions: numbers of sessions at once.
        """
        folder = Path(workload.checkpoint).with_name("pictures")
        folder.mkdir(exist_ok=True)
        pictures, questions = {}, {}
        for load, count in [WARM_UP, *((count, count) for count in sessions)]:
            for session in range(count):
                key = _key(load, session)
                file = folder / f"{key}.png"
                file.write_bytes(workload.picture(load, session))
                pictures[key] = str(file)
                questions[key] = [
                    workload.question(load, session, turn) for turn in range(workload.turns)
                ]
        lengths = workload.turns, workload.answer_tokens
        return cls(workload.checkpoint, dtype, *lengths, pictures, questions)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Script:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def picture(self, load: int, session: int) -> bytes:
        """As `Workload.picture`."""
        return Path(self.pictures[_key(load, session)]).read_bytes()

    def question(self, load: int, session: int, turn: int) -> str:
        """As `Workload.question`."""
        return self.questions[_key(load, session)][turn]


def _key(load: int, session: int) -> str:
    return f"{load}-{session}"
