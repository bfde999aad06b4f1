"""Our engine in this process, with the encoder that the server runs in front, or none."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.load import Answer, Ask, Way
from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.checkpoint.vision_tower import features_shape
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.contract.settings import Settings
from llava_triton.device import compute_dtype, default_device
from llava_triton.engine import Engine, TurnRequest
from llava_triton.model.runner import ModelRunner
from llava_triton.pictures.assembly import PictureAssembly
from llava_triton.pictures.tower import vision_encoding


class Encoder:
    """Encoded pictures to image features, by what the server uses for it."""

    def __init__(self, repository: Path) -> None:
        settings = Settings.of_repository(repository)
        self._pictures = PictureAssembly(
            repository / "language_model" / "1" / "checkpoint",
            repository / "image_encoder" / "1" / "processor",
            settings,
        )
        self._encode = vision_encoding(repository, settings)

    def features(self, picture: bytes) -> Tensor:
        """One picture -> [R, D]."""
        decoded = self._pictures.look(picture).decode()
        return decoded.features(torch.as_tensor(self._encode(decoded.pixels)))


class EngineWay(Way):
    """An engine in this process.

    Args:
        checkpoint: its directory.
        settings: its limits, and what it computes in.
        features: of a picture [T, D]; None: random ones, the same for the same picture.
        device: where to compute; by default the GPU, where there is one.
        record: as for `ModelRunner`.
    """

    tells_by_engine = True

    def __init__(
        self,
        checkpoint: Path,
        settings: Settings,
        features: Callable[[bytes], Tensor] | None = None,
        *,
        device: torch.device | None = None,
        record: bool | None = None,
    ) -> None:
        device = device or default_device()
        dtype = compute_dtype(settings.dtype, device)
        loaded = load_checkpoint(checkpoint, dtype=dtype, device=device)
        self.runner = ModelRunner(loaded, settings, record)
        self.engine = Engine(self.runner, loaded.tokenizer, settings)
        self._checkpoint = checkpoint
        self._features = features

    @classmethod
    def of_repository(
        cls,
        repository: Path,
        dtype: str,
        weights: str = "unrounded",
        max_sessions: int | None = None,
    ) -> EngineWay:
        """As `llava_triton.serving.language_model` makes it, and the encoder before it.

        Args:
            repository: the exported model repository.
            dtype: a value of `Settings.dtype`.
            weights: a value of `Settings.weights`.
            max_sessions: open at once; None: as the repository says.
        """
        settings = Settings.of_repository(repository)
        settings = dataclasses.replace(
            settings,
            dtype=dtype,
            weights=weights,
            max_sessions=max_sessions or settings.max_sessions,
        )
        checkpoint = repository / "language_model" / "1" / "checkpoint"
        return cls(checkpoint, settings, Encoder(repository).features)

    @cached_property
    def features_shape(self) -> tuple[int, int]:
        """Of one picture: tokens, width."""
        config = llava_config(self._checkpoint)
        return features_shape(config, config.vision_config.image_size)

    def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        """See `Way`; at most one picture a turn. Encoding it is part of the answer's time, making
        features up is not."""
        answer = answer or Answer()
        features: tuple[Tensor, ...] = ()
        if ask.images:
            (picture,) = ask.images
            features = ((self._features or self._random_features)(picture),)
            if self._features is None:
                answer.asked_at = time.perf_counter()
        request = TurnRequest(
            session_id=ask.session_id,
            start=ask.start,
            end=ask.end,
            text=ask.text,
            image_features=features,
            sampling=SamplingParameters(**ask.sampling),
        )

        def listener(event: Delta | SessionError) -> None:
            if isinstance(event, SessionError):
                answer.end(event)
                return
            answer.take(event)
            if event.is_final:
                answer.end()

        answer.submitted_at = time.perf_counter()
        self.engine.submit(request, listener)
        return answer

    def _random_features(self, picture: bytes) -> Tensor:
        """As small as embeddings are."""
        device = self.runner.device
        generator = torch.Generator(device).manual_seed(zlib.crc32(picture))
        return torch.randn(self.features_shape, generator=generator, device=device).mul_(0.02)

    def close(self) -> None:
        """Stop the engine."""
        self.engine.shutdown()
