"""The language model on its device: steps in, tokens and logits out."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_triton.checkpoint.families import family_of
from llava_triton.checkpoint.loader import Checkpoint
from llava_triton.contract.settings import Settings
from llava_triton.device import DeviceTimer, keep_for_current_stream, policy_of, to_device, to_host
from llava_triton.kernels.base import BLOCK_TOKENS, Rows
from llava_triton.kernels.cpu.attention import release_workers
from llava_triton.model.decode_graphs import SIZES, DecodeGraphs
from llava_triton.model.kv_pages import Pages, block_bytes
from llava_triton.model.logits_processors import process_logits
from llava_triton.model.logprobs import AskedLogprobs
from llava_triton.model.memory_size import (
    GpuNeeds,
    blocks_for,
    check_blocks,
    device_memory,
    features_budget,
    host_budgets,
    host_memory,
    memory_budget,
)
from llava_triton.model.prefault import Prefault
from llava_triton.model.sampling import Draw, next_tokens
from llava_triton.model.step import LaunchedStep, Step, StepPart, StepResult, TransferError
from llava_triton.model.text_model import TextModel

log = logging.getLogger(__name__)

SMALL_MODEL_PARAMETERS = 30_000_000
WARM_UP_TOKENS = (2, 16, 64, 256, 1024)
"""Of prompts: libraries choose other kernels for other numbers of rows."""
PINNED_AT_START = 4 << 30
"""Bytes of host memory, at the most; a second or two. The rest is pinned when it is needed."""


class ModelRunner:
    """Runs a LLaVA checkpoint's text model over pages; the vision tower is not read.

    Args:
        checkpoint: what is to run, where and in what.
        settings: sizes of the memories.
        record: compute decode steps in the shapes of CUDA graphs; None: on a GPU.

    Raises:
        ValueError: a text model that is not served; too little memory for one session.
        CheckpointError: its weights cannot be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, record: bool | None = None
    ) -> None:
        model = checkpoint.skeleton
        config = model.config
        self._threads = cpu_threads(model)
        self.image_token_id = int(config.image_token_id)
        video = getattr(config, "video_token_id", None)
        words = int(model.lm_head.weight.shape[0])
        self._placeholders = [
            each for each in (self.image_token_id, video) if each is not None and each < words
        ]
        """Tokens that stand for pictures and videos."""
        self.eos_token_ids = _eos_token_ids(model, checkpoint.tokenizer)
        self._text_model = TextModel(checkpoint, weights=settings.weights)
        self.context_length = self._text_model.context_length
        geometry, layers = self._text_model.geometry, self._text_model.layers
        self.block_bytes = block_bytes(layers, geometry, self._text_model.dtype)
        policy = self._policy = policy_of(self.device)
        self.prefill_chunk_tokens = settings.prefill_chunk_tokens or policy.prefill_chunk_tokens
        row_bytes = self.hidden_size * self._text_model.dtype.itemsize
        self.picture_tokens = family_of(config).photograph_tokens
        """Of one ordinary picture. Memory is planned for pictures of so many; what a session brings
        may have more or fewer."""
        picture_bytes = self.picture_tokens * row_bytes
        tower = sum(each.numel() for each in model.model.vision_tower.parameters())
        needs = GpuNeeds.of(tower, min(settings.max_sessions, SIZES[-1]), self.vocabulary)
        budget = memory_budget(self.device, needs)
        self.image_bytes_on_device = features_budget(settings, picture_bytes, budget, self.device)
        blocks = blocks_for(
            settings,
            self.block_bytes,
            self.context_length,
            budget,
            self.image_bytes_on_device,
            self.device,
        )
        check_blocks(blocks, self.picture_tokens, settings, self.device)
        self.pages = Pages(
            layers,
            blocks,
            geometry,
            self._text_model.dtype,
            self.device,
            keys_by_token=self._text_model.kernels.keys_by_token,
        )
        tensors = (self.pages.keys, self.pages.values)
        self._prefault = Prefault(tensors) if policy.is_host else None
        self.host_kv_bytes, self.host_image_bytes = host_budgets(
            settings, host_memory(), self.device
        )
        self.steps_at_once = policy.steps_at_once
        """See `DevicePolicy`."""
        self._latest = torch.zeros(settings.max_sessions, dtype=torch.int64, device=self.device)
        """What followed each row of the step launched last."""
        self._decode_graphs: DecodeGraphs | None = None
        if record if record is not None else policy.decode_graphs:
            self._warm_up()
            try:
                self._decode_graphs = self._capture(settings.max_sessions)
            except RuntimeError as error:  # slower is better than not at all
                log.warning("decode steps are computed unrecorded: %s", error)
        if not policy.is_host:
            self.pages.pin_host_memory(min(self.host_kv_bytes, PINNED_AT_START))
            left = device_memory(self.device) / (1 << 30)
            log.info("%d blocks of keys and values; %.1f GiB of the GPU are free", blocks, left)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compute prompts: a GPU's kernels are compiled and its libraries' loaded now, not while
        the first clients wait.

        Raises:
            RuntimeError: the device does not run the kernels.
        """
        try:
            for tokens in WARM_UP_TOKENS:
                if tokens <= min(self.prefill_chunk_tokens, self.context_length):
                    blocks = [self.pages.spare] * -(-tokens // BLOCK_TOKENS)
                    parts = [StepPart([0] * tokens, 0, blocks)]
                    last = to_device(np.array([tokens - 1]), self.device)
                    logits = self._logits(self._embeddings(parts), self._rows(parts), last)
                    next_tokens(logits, [Draw(1.0, 2, 0.5, 0.5)])
        except Exception as error:  # Triton's are of many classes
            raise RuntimeError(f"the kernels do not run on {self.device}: {error}") from error

    @torch.inference_mode()
    def _capture(self, sequences: int) -> DecodeGraphs:
        blocks = self.pages.blocks  # no more sequences than blocks, and none with more than all
        return DecodeGraphs(
            lambda ids, rows, out: self._logits(
                self._text_model.embedding[self._known(ids)], rows, out=out
            ),
            self.device,
            self.pages.spare,
            min(sequences, blocks),
            min(self.context_length, blocks * BLOCK_TOKENS),
            self.vocabulary,
        )

    @property
    def has_decode_graphs(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        return self._decode_graphs is not None

    @property
    def device(self) -> torch.device:
        """Where features, keys and values live."""
        return torch.device(self._text_model.device)

    @property
    def hidden_size(self) -> int:
        """Width `D` of an image feature and of a token's embedding."""
        return int(self._text_model.embedding.shape[1])

    @property
    def vocabulary(self) -> int:
        """How many tokens there are logits for."""
        return self._text_model.vocabulary

    def features_on_device(self, features: Tensor) -> Tensor:
        """One picture's features [T, D] of any float dtype -> as the model computes them, a copy
        of their own."""
        placed = features.to(self.device, self._text_model.dtype, copy=True)
        keep_for_current_stream(features)  # made beside the one that the copy waits in
        return placed

    def use_threads(self) -> None:
        """Let the calling thread use as many CPU cores as are worth having."""
        if self._policy.is_host:
            torch.set_num_threads(self._threads)

    def leave_threads(self) -> None:
        """Let the calling thread compute on one CPU core, as all but one of a process should.

        OpenMP keeps workers for every thread that ever used several cores. Once there are more of
        them than cores, none waits spinning for the next operation: every one costs a sleep and a
        waking, 3 ms in a decode step of 12 layers.
        """
        if self._policy.is_host:
            torch.set_num_threads(1)
            release_workers()

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Do a step's moves of blocks, then compute its tokens; a GPU may not have begun when this
        returns.

        Raises:
            TransferError: a move failed; nothing is computed.
        """
        try:
            for transfer in step.transfers:
                transfer()
        except Exception as error:
            raise TransferError(f"blocks could not be moved: {error}") from error
        timer = DeviceTimer(self.device)
        parts = step.parts
        if self._prefault is not None:
            self._prefault.used(max(part.blocks[-1] for part in parts))
        if self._decode_graphs is not None and self._decode_graphs.takes(parts):
            logits = self._decode_graphs.logits(parts)
        else:
            ends = np.cumsum([len(part.ids) for part in parts]) - 1
            last = to_device(ends, self.device)
            logits = self._logits(self._embeddings(parts), self._rows(parts), last)
        logprobs = AskedLogprobs(logits, [part.choice.logprobs for part in parts])
        process_logits(logits, [part.choice.change for part in parts], self._known)
        tokens = next_tokens(logits, [part.choice.draw for part in parts])
        self._latest[: len(parts)] = tokens.clamp(min=0)  # NO_TOKEN has no embedding
        told, told_logprobs = to_host(tokens), logprobs.of(tokens)
        timer.end()

        def wait() -> StepResult:
            seconds = timer.wait()
            return StepResult(told.tolist(), seconds, told_logprobs())

        return LaunchedStep(wait)

    def _logits(
        self,
        embeddings: Tensor,
        rows: Rows,
        last: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """What follows the rows `last` (None: all of them), float32 [N, V]; written to `out` where
        it is given."""
        pages = self.pages
        hidden = self._text_model.hidden_states(embeddings, pages.keys, pages.values, rows, last)
        logits = self._text_model.logits(hidden, out)
        # Spoken by the model it would stand for a picture that does not exist.
        logits[:, self._placeholders] = -torch.inf
        return logits

    def _known(self, ids: Tensor) -> Tensor:
        """Token IDs in the place of what `token_after` gave."""
        return torch.where(ids < 0, self._latest[(-1 - ids).clamp(min=0)], ids)

    def _embeddings(self, parts: list[StepPart] | Any) -> Tensor:
        ids = np.concatenate([np.asarray(part.ids, dtype=np.int64) for part in parts])
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        pictures, places = [], []
        for start, part in zip(starts, parts, strict=False):
            for rows in part.image_rows:
                features = rows.image.features[rows.first : rows.last]
                pictures.append(features.to(self.device, non_blocking=True))
                places.append(np.arange(len(features)) + start + rows.at)
        if pictures:
            ids[np.concatenate(places)] = 0  # a placeholder need not have an embedding
        embeddings = self._text_model.embedding[self._known(to_device(ids, self.device))]
        if pictures:
            embeddings[to_device(np.concatenate(places), self.device)] = torch.cat(pictures)
        return embeddings

    def _rows(self, parts: list[StepPart] | Any) -> Rows:
        lengths = [len(part.ids) for part in parts]
        starts = np.zeros(len(parts) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        contexts = np.array([part.context for part in parts], dtype=np.int32)
        tables = np.zeros((len(parts), max(len(part.blocks) for part in parts)), dtype=np.int32)
        for row, part in zip(tables, parts, strict=True):
            row[: len(part.blocks)] = part.blocks
        first_positions = np.repeat(contexts - starts[:-1], lengths)
        positions = first_positions.astype(np.int64) + np.arange(starts[-1])
        arrays = (starts, contexts, tables, positions)
        return Rows(*(to_device(array, self.device) for array in arrays))


def cpu_threads(model: Any) -> int:
    """Threads worth having for a model on the CPU.

    A small model's layers are computed by one before a second one has woken up.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1 if parameters < SMALL_MODEL_PARAMETERS else len(os.sched_getaffinity(0))


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, as transformers' `generate` would see it."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
