"""An engine in the test's own process, and turns asked of it as a client would."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoProcessor

from llava_triton.checkpoint import load_checkpoint
from llava_triton.delta import Delta
from llava_triton.engine import Engine, TurnRequest
from llava_triton.engine.model_runner import ModelRunner
from llava_triton.engine.session import SessionId
from llava_triton.errors import SessionError
from llava_triton.sampling import SamplingParameters
from llava_triton.settings import Settings
from tests.reference import image_features, load_reference

PATIENCE_SECONDS = 120.0
"""No answer of a tiny model takes this long: a test that waits longer has found a hang."""

SMALL_MEMORIES = {
    "kv_cache_bytes": 64 << 20,
    "host_cache_bytes": 64 << 20,
    "image_features_bytes": 64 << 20,
}


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Pending:
    """A submitted turn; its events arrive from the engine's thread."""

    id: str = ""
    events: queue.SimpleQueue[Delta | SessionError] = field(default_factory=queue.SimpleQueue)

    def deltas(self) -> Iterator[Delta]:
        """Pieces as they come; an error is raised."""
        while True:
            event = self.events.get(timeout=PATIENCE_SECONDS)
            if isinstance(event, SessionError):
                raise event
            yield event
            if event.is_final:
                return

    def wait(self) -> tuple[str, Delta]:
        """The whole text and the final piece."""
        pieces = list(self.deltas())
        return "".join(piece.text for piece in pieces), pieces[-1]


class EngineHarness:
    """An engine on a checkpoint, with transformers' own vision tower in front."""

    def __init__(self, checkpoint: Path, **limits: Any) -> None:
        self.clock = Clock()
        self._vision = load_reference(checkpoint)
        self._processor = AutoProcessor.from_pretrained(checkpoint)
        loaded = load_checkpoint(checkpoint)
        settings = Settings(**{**SMALL_MEMORIES, **limits})
        self.runner = ModelRunner(loaded, settings)
        self.engine = Engine(self.runner, loaded.tokenizer, settings, clock=self.clock)

    def features(self, images: Sequence[Image]) -> torch.Tensor | None:
        """Image features [N, T, D]; None for no images."""
        return image_features(self._vision, self._processor, images) if images else None

    def submit(
        self,
        session_id: SessionId,
        text: str | None = None,
        images: Sequence[Image] = (),
        *,
        start: bool = False,
        end: bool = False,
        listen: Callable[[Any], None] | None = None,
        **sampling: Any,
    ) -> Pending:
        """Send a turn and return at once; answers are as long as the reference's by default."""
        sampling.setdefault("max_tokens", 32)
        pending = Pending()
        request = TurnRequest(
            session_id=session_id,
            start=start,
            end=end,
            text=text,
            image_features=self.features(images),
            sampling=SamplingParameters(**sampling),
        )

        def listener(event: Delta | SessionError) -> None:
            if listen is not None:
                listen(event)
            pending.events.put(event)

        pending.id = self.engine.submit(request, listener)
        return pending

    def ask(self, session_id: SessionId, *args: Any, **kwargs: Any) -> tuple[str, Delta]:
        """Send a turn and wait for its answer."""
        return self.submit(session_id, *args, **kwargs).wait()

    def shutdown(self) -> None:
        """Stop the engine's thread."""
        self.engine.shutdown()
