"""An engine in the test's own process, and turns asked of it as a client would."""

from __future__ import annotations

import functools
import io
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from PIL.Image import open as open_image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.operations import NO_OPERATION, Operation
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.contract.settings import Settings
from llava_triton.device import compute_dtype
from llava_triton.engine import Engine, TurnRequest
from llava_triton.engine.image_store import ImageStore, digest_of
from llava_triton.engine.journaling import SessionJournal
from llava_triton.engine.session import Session, SessionId
from llava_triton.engine.session_memory import SessionMemory, block_key
from llava_triton.engine.state import EngineState
from llava_triton.journal.journal import Journal
from llava_triton.journal.records import session_key
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.runner import ModelRunner
from llava_triton.model.sampling import SamplingParameters
from llava_triton.model.step import LaunchedStep, Step
from tests.reference import image_features, load_reference

PATIENCE_SECONDS = 120.0
"""No answer of a tiny model takes this long: a test that waits longer has found a hang."""

SMALL_MEMORIES = {
    "kv_cache_bytes": 64 << 20,
    "host_cache_bytes": 64 << 20,
    "image_features_bytes": 64 << 20,
}

Result = TypeVar("Result")


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
    """An engine on a checkpoint, with transformers' own vision tower in front.

    Args:
        checkpoint: its folder.
        record: as for ModelRunner.
        steps_at_once: of the runner, if not its own.
        device: where it computes.
        tower: a checkpoint whose vision tower transformers reads, where it cannot read this one's.
        **limits: settings.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        record: bool | None = None,
        steps_at_once: int | None = None,
        device: str = "cpu",
        tower: Path | None = None,
        **limits: Any,
    ) -> None:
        self.clock = Clock()
        self._tower = tower or checkpoint
        self.settings = Settings(**{**SMALL_MEMORIES, **limits})
        dtype = compute_dtype(self.settings.dtype, torch.device(device))
        loaded = load_checkpoint(checkpoint, dtype=dtype, device=device)
        self._tokenizer = loaded.tokenizer
        self.runner = ModelRunner(loaded, self.settings, record)
        self.runner.steps_at_once = steps_at_once or self.runner.steps_at_once
        self.identity = "a checkpoint"
        """By which the journal knows it."""
        self.wall = Clock(time.time())
        """Seconds since 1970, as the journal has them."""
        self.encoded = 0
        """Pictures that were encoded again for sessions that were resumed."""
        self.expired: list[SessionId] = []
        """Sessions that the engine said it had closed by itself."""
        self.engine = self._start()

    def _start(self) -> Engine:
        journal = None
        if self.settings.journal:
            self.journal = Journal(self.settings, self.identity, self.wall)
            journal = SessionJournal(self.journal, self._encode, self.runner)
        return Engine(
            *(self.runner, self._tokenizer, self.settings, self.clock),
            expired=self.expired.append,
            journal=journal,
        )

    def _encode(self, items: Sequence[bytes], tenant: str) -> tuple[torch.Tensor, ...]:
        """In the place of image_encoder: features of pictures out of the journal."""
        self.encoded += len(items)
        return self.features([open_image(io.BytesIO(item)) for item in items])

    def _keep(self, session_id: SessionId, tenant: str, images: Sequence[Image]) -> None:
        """In the place of image_encoder: pictures into the journal."""
        key = session_key(session_id, tenant)
        for image, features in zip(images, self.features(images), strict=True):
            file = io.BytesIO()
            image.save(file, "PNG")
            self.journal.keep(key, digest_of(features, tenant).hex(), file.getvalue())

    def features(self, images: Sequence[Image]) -> tuple[torch.Tensor, ...]:
        """Image features [T, D] of each, the same bits whichever others are beside it."""
        return tuple(_features_of(self._tower, _Picture(image)) for image in images)

    def submit(
        self,
        session_id: SessionId,
        text: str | None = None,
        images: Sequence[Image] = (),
        *,
        start: bool = False,
        end: bool = False,
        history: Sequence[PastTurn] = (),
        tenant: str = NO_TENANT,
        operation: Operation = NO_OPERATION,
        request_id: str = "",
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
            history=tuple(history),
            tenant=tenant,
            operation=operation,
            request_id=request_id,
            sampling=SamplingParameters(**sampling),
        )

        def listener(event: Delta | SessionError) -> None:
            if listen is not None:
                listen(event)
            pending.events.put(event)

        if self.settings.journal and images and not end:
            self._keep(session_id, tenant, images)
        pending.id = self.engine.submit(request, listener)
        return pending

    def ask(self, session_id: SessionId, *args: Any, **kwargs: Any) -> tuple[str, Delta]:
        """Send a turn and wait for its answer."""
        return self.submit(session_id, *args, **kwargs).wait()

    def shutdown(self) -> None:
        """Stop the engine's thread."""
        self.engine.shutdown()

    # What only a test does.

    def restart(self) -> None:
        """A new engine with nothing open, on the same device; its pages hold nothing but NaN."""
        self.engine.shutdown()
        self.runner.pages.keys.fill_(torch.nan)
        self.runner.pages.values.fill_(torch.nan)
        self.expired.clear()
        self.engine = self._start()

    def inspect(self, look: Callable[[EngineState], Result]) -> Result:
        """What `look` returns, called on the engine's own thread: nothing changes meanwhile."""
        return self.engine.inspect(look).result(PATIENCE_SECONDS)

    def session(self, session_id: SessionId) -> Session:
        """An open session, to look at on the engine's thread or while nothing runs."""
        opened = self.inspect(lambda state: list(state.sessions.oldest_first()))
        (session,) = (each for each in opened if each.id == session_id)
        return session

    def history(self, session_id: SessionId) -> list[int]:
        """All tokens of an open session's conversation, up to its last completed turn."""
        session = self.session(session_id)
        return self.inspect(lambda _: session.tokens[: session.committed])

    def evict_idle(self, *session_ids: SessionId) -> int:
        """Take the blocks of idle sessions (of all or of these), as memory pressure would.

        Returns:
            How many sessions had any.
        """

        def evict(state: EngineState) -> int:
            resident = [each for each in state.idle_sessions() if each.key_values.blocks]
            if session_ids:
                resident = [each for each in resident if each.id in session_ids]
            for session in resident:
                state.memory.evict(session)
            return len(resident)

        return self.inspect(evict)

    def poison_free_blocks(self) -> None:
        """Nobody finds what free blocks held, and whoever reads them reads NaN."""

        def poison(state: EngineState) -> None:
            pool, pages = state.memory.pool, self.runner.pages
            free = pool.allocate(pool.free) or []

            def write() -> None:
                pages.keys[:, free] = torch.nan
                pages.values[:, free] = torch.nan

            # As any other move of blocks: after those that were planned before.
            state.memory.transfers.append(write)
            for block in free:
                pool.release(block)

        self.inspect(poison)

    def check_state(self) -> None:
        """Everything the engine counts adds up at this moment, whatever is in flight."""
        self.inspect(_check_state)

    def assert_nothing_is_held(self) -> None:
        """No session, no turn, and no memory of any."""
        self.check_state()
        now = self.engine.statistics()
        assert (now.sessions_open, now.sessions_active, now.turns_in_flight) == (0, 0, 0)
        assert (now.blocks_free, now.blocks_shared) == (now.blocks_total, 0)
        assert (now.host_bytes, now.images) == (0, 0)
        assert self.inspect(lambda state: state.images.device_bytes) == 0
        assert self.inspect(lambda state: state.images.host_bytes) == 0
        assert self.inspect(lambda state: list(state.memory.on_host())) == []

    @contextmanager
    def held_device(self) -> Iterator[HeldDevice]:
        """The device stops before its next step and goes on when the block ends, or when told."""
        device = HeldDevice(self.runner.launch)
        self.runner.launch = device.launch  # type: ignore[method-assign]
        try:
            yield device
        finally:
            del self.runner.launch
            device.go_on()

    @contextmanager
    def failing_step(self, turns: int = 1) -> Iterator[FailingStep]:
        """The next step of at least so many turns fails when it has been computed."""
        step = FailingStep(self.runner, turns)
        self.runner.launch = step.launch  # type: ignore[method-assign]
        try:
            yield step
        finally:
            del self.runner.launch


class HeldDevice:
    """A device that waits before each step.

    Args:
        launch: what it does then.
    """

    def __init__(self, launch: Callable[[Step], LaunchedStep]) -> None:
        self._launch = launch
        self._has_work = threading.Event()
        self._may_go_on = threading.Event()

    def launch(self, step: Step) -> LaunchedStep:
        """In the place of `ModelRunner.launch`."""
        self._has_work.set()
        assert self._may_go_on.wait(PATIENCE_SECONDS)
        return self._launch(step)

    def wait_until_busy(self) -> None:
        """Return when a step waits."""
        assert self._has_work.wait(PATIENCE_SECONDS)

    @property
    def going(self) -> bool:
        """Whether it was told to go on."""
        return self._may_go_on.is_set()

    def go_on(self) -> None:
        """Wait no more, now and later."""
        self._may_go_on.set()


class FailingStep:
    """A device that loses a step: what it should have written is NaN.

    Args:
        runner: the device.
        turns: how many the step has at the least.
    """

    def __init__(self, runner: ModelRunner, turns: int) -> None:
        self._pages = runner.pages
        self._launch = runner.launch
        self._least = turns
        self.turns = 0
        """Of the step that failed; 0 before."""

    def launch(self, step: Step) -> LaunchedStep:
        """In the place of `ModelRunner.launch`."""
        result = self._launch(step)  # blocks that were to be moved are moved
        if self.turns or len(step.parts) < self._least:
            return result
        self.turns = len(step.parts)
        for part in step.parts:
            for position in range(part.context, part.context + len(part.ids)):
                block, slot = part.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                self._pages.keys[:, block, :, :, slot] = torch.nan
                self._pages.values[:, block, :, slot] = torch.nan
        raise RuntimeError("the device lost a bit")


class _Picture:
    """A picture that equals another one of the same pixels."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._content = (image.mode, image.size, image.tobytes())

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Picture) and self._content == other._content


@functools.lru_cache(maxsize=8)
def _vision(checkpoint: Path) -> tuple[Any, Any]:
    return load_reference(checkpoint), AutoImageProcessor.from_pretrained(checkpoint, backend="pil")


@functools.lru_cache(maxsize=1024)
def _features_of(checkpoint: Path, picture: _Picture) -> torch.Tensor:
    model, processor = _vision(checkpoint)
    return image_features(model, processor, [picture.image])[0]


def _check_state(state: EngineState) -> None:
    sessions, lanes, memory = list(state.sessions.oldest_first()), state.lanes, state.memory
    for running in state.running:
        assert running.session in sessions, "a turn runs for a session that is not open"
    turns = lanes.all()
    assert lanes.turns == len(turns)
    assert lanes.features_bytes == sum(turn.request.features_bytes for turn in turns)
    _check_blocks(memory, sessions)
    idle = [each for each in sessions if each.key_values.blocks and each.id not in lanes]
    assert list(state.idle_sessions()) == idle
    with_blocks = [each for each in sessions if each.key_values.blocks]
    assert set(memory.on_device()) == set(with_blocks)
    assert sorted(map(id, state.sessions.longest_open_first())) == sorted(map(id, sessions))
    for session in sessions:
        _check_session(memory, session)
    _check_host_copies(memory, sessions)
    _check_images(state.images, sessions)


def _check_blocks(memory: SessionMemory, sessions: Sequence[Session]) -> None:
    pool = memory.pool
    held = Counter(block for session in sessions for block in session.key_values.blocks)
    assert pool.holders() == [held[block] for block in range(pool.blocks)]
    assert pool.free + len(held) == pool.blocks
    pool.check()
    holders: dict[int, set[str]] = {}
    for session in sessions:
        for block in session.key_values.blocks:
            holders.setdefault(block, set()).add(session.tenant)
    assert all(len(tenants) == 1 for tenants in holders.values()), "tenants share a block"


def _check_session(memory: SessionMemory, session: Session) -> None:
    kv = session.key_values
    assert len(set(kv.blocks)) == len(kv.blocks)
    if kv.host is None:
        assert len(kv.blocks) * BLOCK_TOKENS >= kv.computed
    else:
        assert not kv.blocks, "a session is on the host and on the device"
        assert kv.computed
    assert len(kv.keys) == kv.computed // BLOCK_TOKENS
    for index, key in enumerate(kv.keys):
        assert key == block_key(session, kv.keys[:index])
        if kv.blocks:
            assert memory.pool.key_of(kv.blocks[index]) in (None, key)
    assert kv.computed <= len(session.tokens)
    assert session.committed <= len(session.tokens)
    _check_turns(session)
    end = 0
    for span, image in zip(session.spans, session.images, strict=False):
        assert (span.image, span.length) == (image, image.tokens)
        assert end <= span.start < span.end <= len(session.tokens)
        assert len(set(session.tokens[span.start : span.end])) == 1
        end = span.end
    assert len(session.spans) <= len(session.images)


def _check_turns(session: Session) -> None:
    end = images = 0
    for number, turn in enumerate(session.turns):
        mark = session.mark(number)
        assert (mark.committed, mark.images) == (end, images + turn.pending)
        assert end <= mark.length <= turn.asked <= turn.end <= len(session.tokens)
        shown = list(session.pictures(end, turn.asked))
        assert len(shown) == turn.images - images >= turn.pending
        end, images = turn.end, turn.images
    assert images + session.pending_images <= len(session.images)


def _check_host_copies(memory: SessionMemory, sessions: Sequence[Session]) -> None:
    there = [session for session in sessions if session.key_values.host is not None]
    copies = [session.key_values.host.bytes for session in there if session.key_values.host]
    assert memory.host_bytes == sum(copies) <= memory.host_budget
    assert set(memory.on_host()) == set(there)


def _check_images(store: ImageStore, sessions: Sequence[Session]) -> None:
    shown = Counter(image for session in sessions for image in session.held_images)
    on_device, on_host = list(store.on_device()), list(store.on_host())
    assert sorted(map(id, [*on_device, *on_host])) == sorted(map(id, shown))
    assert all(image.holders == count for image, count in shown.items())
    for image in shown:
        tenants = {each.tenant for each in sessions if image in each.held_images}
        assert len(tenants) == 1, "tenants share a picture"
    used = (store.device_bytes, store.host_bytes)
    assert used == (sum(each.bytes for each in on_device), sum(each.bytes for each in on_host))
    assert all(bytes_ <= budget for bytes_, budget in zip(used, store.budgets, strict=True))
