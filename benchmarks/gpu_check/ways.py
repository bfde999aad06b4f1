"""Two ways to ask a model, the engine in this process and Triton over gRPC; their answers."""

from __future__ import annotations

import io
import queue
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import MistralConfig

from benchmarks.gpu_check.stage import Place
from benchmarks.workload import GEOMETRIES, QUICK, Geometry
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.client.transport import Transport, TurnMessage
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.contract.settings import Settings
from llava_triton.engine import Engine, TurnRequest
from llava_triton.model.runner import ModelRunner

PATIENCE_SECONDS = 120.0
"""Nothing comes for so long: it hangs."""

Result = TypeVar("Result")


def geometry_of(name: str, *, cpu: bool) -> Geometry:
    """The model of that name, or a tiny one of the same kind."""
    if not cpu:
        return GEOMETRIES[name]
    grouped = {"num_key_value_heads": 2, "sliding_window": None}
    if GEOMETRIES[name].family is MistralConfig:
        return Geometry(QUICK.vision, QUICK.text | grouped, MistralConfig)
    return QUICK


@dataclass
class Answer:
    """What came of one turn, and when (by `time.perf_counter`)."""

    asked_at: float = field(default_factory=time.perf_counter)
    events: list[tuple[float, Delta]] = field(default_factory=list)
    """Every piece with tokens."""
    text: str = ""
    final: Delta | None = None
    ended_at: float = 0.0
    _ended: queue.SimpleQueue[Exception | None] = field(default_factory=queue.SimpleQueue)

    def take(self, delta: Delta) -> None:
        """A piece has come."""
        now = time.perf_counter()
        self.text += delta.text
        if delta.num_output_tokens:  # else only a sign of life
            self.events.append((now, delta))
        if delta.is_final:
            self.final, self.ended_at = delta, now

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come."""
        self._ended.put(error)

    def wait(self) -> Answer:
        """Until it has ended; an error is raised."""
        error = self._ended.get(timeout=PATIENCE_SECONDS)
        if error is not None:
            raise error
        return self

    @property
    def done(self) -> Delta:
        """The final piece."""
        assert self.final is not None, "the answer has not ended"
        return self.final

    @property
    def first_token_seconds(self) -> float:
        """From the question to the first piece."""
        return self.events[0][0] - self.asked_at

    @property
    def seconds(self) -> float:
        """From the question to the end."""
        return self.ended_at - self.asked_at

    @property
    def between_tokens_seconds(self) -> float:
        """Mean, behind the first piece."""
        (began, first), (ended, last) = self.events[0], self.events[-1]
        return (ended - began) / (last.num_output_tokens - first.num_output_tokens)

    def tokens_at(self, when: float) -> int:
        """That had come by then."""
        index = bisect_right(self.events, when, key=lambda event: event[0])
        return self.events[index - 1][1].num_output_tokens if index else 0


def joint_tokens_per_second(answers: Sequence[Answer]) -> float | None:
    """Of all answers, while all of them were coming; None where they never were."""
    began = max(answer.events[0][0] for answer in answers)
    ended = min(answer.events[-1][0] for answer in answers)
    tokens = sum(answer.tokens_at(ended) - answer.tokens_at(began) for answer in answers)
    return tokens / (ended - began) if ended > began and tokens else None


@dataclass(frozen=True)
class Ask:
    """One turn."""

    session: str
    """Its ID."""
    picture: bytes | None = None
    """Encoded."""
    text: str | None = None
    """The question; None for an opening that only prepares, or an end."""
    answer_tokens: int = 1
    """Exactly so many, greedily."""
    start: bool = False
    """Opens the session."""
    end: bool = False
    """Closes it."""


class Way(Protocol):
    """Takes turns; each answer is waited for by whoever asked."""

    def ask(self, ask: Ask) -> Answer:
        """Ask and return at once."""


class EngineWay:
    """An engine in this process.

    Args:
        checkpoint: its directory.
        place: where and in what to compute.
        features: pictures to features [1, T, D]; None: random ones, the same for the same picture.
        ignore_eos: answers go on behind the model's own end.
        record: as for `ModelRunner`.
        limits: fields of `Settings`.
    """

    def __init__(
        self,
        checkpoint: Path,
        place: Place,
        features: Callable[[bytes], Tensor] | None = None,
        *,
        ignore_eos: bool = True,
        record: bool | None = None,
        **limits: Any,
    ) -> None:
        settings = Settings(**{"dtype": place.dtype_name, **limits})
        loaded = load_checkpoint(checkpoint, dtype=place.dtype, device=place.device)
        self.text_config = loaded.model.config.get_text_config()
        self.runner = ModelRunner(loaded, settings, record)
        self.engine = Engine(self.runner, loaded.tokenizer, settings)
        self.place = place
        self._features = features
        self._ignore_eos = ignore_eos

    def ask(self, ask: Ask) -> Answer:
        """See `Way`. Encoding a picture is part of the answer's time, making features up is not."""
        answer = Answer()
        features: tuple[Tensor, ...] = ()
        if ask.picture is not None and self._features is not None:
            features = tuple(self._features(ask.picture))
        elif ask.picture is not None:
            features = (self._random_features(ask.picture),)
            answer.asked_at = time.perf_counter()
        request = TurnRequest(
            session_id=ask.session,
            start=ask.start,
            end=ask.end,
            text=ask.text,
            image_features=features,
            sampling=SamplingParameters(max_tokens=ask.answer_tokens, ignore_eos=self._ignore_eos),
        )

        def listener(event: Delta | SessionError) -> None:
            if isinstance(event, SessionError):
                answer.end(event)
                return
            answer.take(event)
            if event.is_final:
                answer.end()

        self.engine.submit(request, listener)
        return answer

    def _random_features(self, picture: bytes) -> Tensor:
        """As small as embeddings are."""
        device = self.runner.device
        generator = torch.Generator(device).manual_seed(zlib.crc32(picture))
        shape = (self.runner.picture_tokens, self.runner.hidden_size)
        return torch.randn(shape, generator=generator, device=device).mul_(0.02)

    def on_engine(self, action: Callable[[Engine], Result]) -> Result:
        """What `action` returns, called on the engine's own thread."""
        return self.engine.on_thread(lambda: action(self.engine)).result(PATIENCE_SECONDS)

    def close(self) -> None:
        """Stop the engine."""
        self.engine.shutdown()


class TritonWay:
    """A Triton server over gRPC, every session with a connection of its own.

    Args:
        connect: makes a connection.
    """

    def __init__(self, connect: Callable[[], Transport]) -> None:
        self._connect = connect
        self._connections: dict[str, Transport] = {}

    def ask(self, ask: Ask) -> Answer:
        """See `Way`."""
        if ask.session not in self._connections:
            self._connections[ask.session] = self._connect()
        message = TurnMessage(
            ask.session,
            start=ask.start,
            end=ask.end,
            text=ask.text,
            images=[] if ask.picture is None else [ask.picture],
            sampling={"max_tokens": ask.answer_tokens, "ignore_eos": True},
        )
        transport, answer = self._connections[ask.session], Answer()

        def follow() -> None:
            try:
                for delta in transport.stream(message):
                    answer.take(delta)
            except Exception as error:
                answer.end(error)
            else:
                answer.end()

        threading.Thread(target=follow, daemon=True).start()
        return answer

    def close(self) -> None:
        """Close the connections."""
        for transport in self._connections.values():
            transport.close()


def large_jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A photograph's worth of detail, of that width and height, as JPEG."""
    width, height = size
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
