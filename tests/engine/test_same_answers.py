"""A session answers what it would answer alone, whatever else the engine has to do."""

from __future__ import annotations

import functools
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image

from demo.shapes import draw, random_scene
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.engine.session import Session
from llava_triton.engine.state import EngineState
from llava_triton.kernels.base import BLOCK_TOKENS
from tests.checkpoints import DEMO, tiny_llava
from tests.engine_harness import EngineHarness, Pending
from tests.reference import TransformersChat

NOISE_SESSIONS = 32
TIE = 1e-4
"""Two logits so close may change places when additions are done in another order."""
TOKENS_PER_TIE = 10_000


@dataclass(frozen=True)
class Say:
    """One turn of a user."""

    text: str | None
    pictures: tuple[int, ...] = ()
    max_tokens: int = 24
    ignore_eos: bool = False


PROBES: dict[str, tuple[Say, ...]] = {
    "a picture": (
        Say("Describe the picture.", (0,), max_tokens=64),
        Say("How many shapes are there?"),
        Say("Which colors are there?", max_tokens=40, ignore_eos=True),
        Say("Is there a red circle?"),
    ),
    "an opening without text": (
        Say(None, (1,)),
        Say("What is in the center?"),
        Say(None, (2,)),
        Say("And what is at the top?", max_tokens=48, ignore_eos=True),
    ),
    "the same picture again": (
        Say("Describe the picture.", (0,), max_tokens=64),
        Say("And this one?", (0,)),
        Say("Where is the circle?", max_tokens=30, ignore_eos=True),
    ),
    "two pictures at once": (
        Say("What do you see?", (3, 4), max_tokens=64),
        Say("And its color?"),
        Say("What about this one?", (1,), max_tokens=48, ignore_eos=True),
        Say("Thank you!"),
    ),
    "no picture at first": (
        Say("Hello!", max_tokens=60, ignore_eos=True),
        Say("What about é, 漢字 and 🙂? " * 6, max_tokens=17),
        Say("Describe the picture.", (5,), max_tokens=64),
        Say("How many squares are there?"),
    ),
    "long answers": (
        Say("Count the shapes.", (6,), max_tokens=90, ignore_eos=True),
        Say("Which shape is on the left?", max_tokens=90, ignore_eos=True),
        Say("How big is it?"),
    ),
}
PICTURES = tuple(
    draw(random_scene(random.Random(f"same answers {number}")), 112) for number in range(12)
)


@dataclass(frozen=True)
class Said:
    """What one turn came to."""

    prompt: list[int]
    """All tokens before the answer; none for a turn that was only prefilled."""
    answer: list[int]
    """Its tokens, the end-of-sequence token included where the model said it."""
    final: Delta


@dataclass(frozen=True)
class Alone:
    """A checkpoint, and what every probe is answered where nothing else is open."""

    checkpoint: Path
    said: Mapping[str, list[Said]]
    block_bytes: int

    @property
    def longest(self) -> int:
        """Tokens of the longest probe."""
        finals = [said[-1].final for said in self.said.values()]
        return max(final.num_input_tokens + final.num_output_tokens for final in finals)


@pytest.fixture(scope="module", params=["demo", "mistral", "qwen2"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The demo checkpoint, and random ones with grouped-query attention."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoint = {
        "demo": lambda: DEMO,
        "mistral": lambda: tiny_llava(folder, text="mistral", kv_heads=2, image_size=112, seed=1),
        "qwen2": lambda: tiny_llava(folder, text="qwen2", kv_heads=1, image_size=56, seed=2),
    }[request.param]()
    harness = EngineHarness(checkpoint)
    said = {}
    for name, turns in PROBES.items():
        harness.restart()
        said[name] = [
            heard(harness, name, submit(harness, name, say, start=index == 0))
            for index, say in enumerate(turns)
        ]
    harness.shutdown()
    return Alone(checkpoint, said, harness.runner.block_bytes)


@pytest.fixture(params=[1, 2], ids=["one step at a time", "one step ahead"])
def start(alone: Alone, request: pytest.FixtureRequest) -> Iterator[Callable[..., EngineHarness]]:
    """Starts an engine on the checkpoint."""
    started: list[EngineHarness] = []

    def make(**limits: Any) -> EngineHarness:
        harness = EngineHarness(alone.checkpoint, steps_at_once=request.param, **limits)
        started.append(harness)
        return started[-1]

    yield make
    for harness in started:
        harness.shutdown()


def submit(harness: EngineHarness, session: str, say: Say, *, start: bool) -> Pending:
    return harness.submit(
        session,
        say.text,
        [PICTURES[number] for number in say.pictures],
        start=start,
        max_tokens=say.max_tokens,
        ignore_eos=say.ignore_eos,
    )


def heard(harness: EngineHarness, session: str, pending: Pending) -> Said:
    """Wait for an answer; its tokens are taken from the session's history."""
    _, final = pending.wait()
    if final.finish_reason == "prefilled":
        return Said([], [], final)
    history = harness.history(session)
    answer = history[final.num_input_tokens :]
    assert len(answer) == final.num_output_tokens
    if final.finish_reason == "stop":
        answer = [*answer, *sorted(harness.runner.eos_token_ids)[:1]]
    return Said(history[: final.num_input_tokens], answer, final)


@dataclass
class Tally:
    """Of all comparisons."""

    tokens: int = 0
    ties: int = 0


@pytest.fixture(scope="module")
def tally() -> Tally:
    """Shared by all tests: ties are rare among all tokens, not among those of each test."""
    return Tally()


class Comparison:
    """Counts compared tokens, and those that differ for a reason that excuses them.

    Args:
        alone: what is right.
        tally: where to count.
    """

    def __init__(self, alone: Alone, tally: Tally) -> None:
        self._alone = alone
        self._tally = tally
        self._before = tally.tokens

    def same(self, probe: str, turn: int, found: Said) -> bool:
        """Compare a turn.

        Returns:
            Whether the conversation's later turns can be compared, too: a tie changes them.
        """
        right = self._alone.said[probe][turn]
        assert found.final.num_input_tokens == right.final.num_input_tokens
        assert found.prompt == right.prompt
        for index, (wanted, got) in enumerate(zip_longest(right.answer, found.answer)):
            self._tally.tokens += 1
            if wanted != got:
                pictures = [
                    PICTURES[number] for say in PROBES[probe][: turn + 1] for number in say.pictures
                ]
                ids = [*right.prompt, *right.answer[:index]]
                best, gap = two_best(self._alone.checkpoint, ids, pictures)
                where = f"{probe!r}, turn {turn}, token {index}: {got} instead of {wanted}"
                assert {wanted, got} == best, where
                assert gap <= TIE, f"{where}; their logits differ by {gap}"
                self._tally.ties += 1
                return False
        return True

    def check(self, least: int) -> None:
        """There was something to compare, and ties are rare."""
        assert self._tally.tokens - self._before >= least
        assert self._tally.ties <= max(1, self._tally.tokens // TOKENS_PER_TIE)


def two_best(checkpoint: Path, ids: list[int], pictures: Sequence[Image]) -> tuple[set[int], float]:
    """The two likeliest tokens after `ids` by plain transformers, and how far they are apart."""
    chat = reference(checkpoint)
    inputs = chat.image_processor(pictures, return_tensors="pt") if pictures else {}
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        output = chat.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs)
    last = output.logits[0, -1].float().clone()
    last[chat.model.config.image_token_id] = -torch.inf
    values, best = last.topk(2)
    return {int(token) for token in best}, float(values[0] - values[1])


@functools.cache
def reference(checkpoint: Path) -> TransformersChat:
    return TransformersChat(checkpoint)


def hold_probes(
    harness: EngineHarness,
    comparison: Comparison,
    run: int = 0,
    after_turn: Callable[[], None] = lambda: None,
    together: bool = False,
) -> None:
    """All probes side by side, turn by turn; `together`: none is ahead of another."""
    names = {name: f"{name} {run}" for name in PROBES}
    for turn in range(max(map(len, PROBES.values()))):
        with harness.held_device() if together else nullcontext():
            asked = {
                name: submit(harness, names[name], PROBES[name][turn], start=turn == 0)
                for name in list(names)
                if turn < len(PROBES[name])
            }
        for name, pending in asked.items():
            if not comparison.same(name, turn, heard(harness, names[name], pending)):
                del names[name]
        after_turn()
        harness.check_state()
    for session in names.values():
        harness.engine.close(session)


class Noise:
    """Sessions that always have a turn in flight, and do at random what clients do.

    Args:
        harness: where.
        seed: of everything random.
    """

    def __init__(self, harness: EngineHarness, seed: int) -> None:
        self._harness = harness
        self._random = random.Random(seed)
        self._news: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._open = [False] * NOISE_SESSIONS
        self._now: list[tuple[Pending, bool, bool]] = []
        """Each session's turn; whether it opens the session, and whether it ends it."""
        self.turns = 0
        self.cancelled = 0
        self.faults: list[Exception] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Noise:
        self._now = [self._next(session) for session in range(NOISE_SESSIONS)]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._news.put(None)
        self._thread.join()
        for session in range(NOISE_SESSIONS):
            self._harness.engine.close(self._name(session))

    @staticmethod
    def _name(session: int) -> str:
        return f"noise {session}"

    def _run(self) -> None:
        try:
            while (news := self._news.get()) is not None:
                session, turn = news
                pending, opens, ends = self._now[session]
                if turn == "to be cancelled":
                    self._harness.engine.cancel(pending.id)
                    continue
                self._ended(session, pending, opens, ends)
                self._now[session] = self._next(session)
        except Exception as error:
            self.faults.append(error)

    def _ended(self, session: int, pending: Pending, opens: bool, ends: bool) -> None:
        self.turns += 1
        try:
            pending.wait()
            self._open[session] = not ends
        except SessionError as error:
            self._open[session] = not (opens or ends) and self._open[session]
            if error.code is ErrorCode.CANCELLED:
                self.cancelled += 1
            elif error.code is ErrorCode.INVALID_ARG and "context is" in error.sentence:
                self._harness.engine.close(self._name(session))
                self._open[session] = False
            else:
                self.faults.append(error)

    def _next(self, session: int) -> tuple[Pending, bool, bool]:
        chance = self._random.random
        if self._open[session] and chance() < 0.07:
            self._harness.engine.close(self._name(session))
            self._open[session] = False
        opens = not self._open[session] or chance() < 0.05
        ends = chance() < 0.08
        pictures = self._random.sample(PICTURES, self._random.choice((0, 0, 1, 1, 2)))
        if not opens and chance() < 0.8:
            pictures = []
        text = (
            None if pictures and chance() < 0.2 else "Tell me more. " * self._random.randint(1, 9)
        )
        to_be_cancelled = chance() < 0.2

        def listen(event: Delta | SessionError) -> None:
            if isinstance(event, SessionError) or event.is_final:
                self._news.put((session, "ended"))
            elif to_be_cancelled and event.text:
                self._news.put((session, "to be cancelled"))

        pending = self._harness.submit(
            self._name(session),
            text,
            pictures,
            start=opens,
            end=ends,
            listen=listen,
            max_tokens=self._random.choice((1, 4, 16, 60)),
            ignore_eos=chance() < 0.5,
            temperature=1.0 if chance() < 0.2 else 0.0,
        )
        return pending, opens, ends


@pytest.mark.parametrize("chunk", [16, 512])
def test_beside_random_sessions(
    alone: Alone, tally: Tally, start: Callable[..., EngineHarness], chunk: int
) -> None:
    harness = start(prefill_chunk_tokens=chunk)
    comparison = Comparison(alone, tally)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, harness.engine.statistics().turns_in_flight)

    with Noise(harness, seed=chunk) as noise:
        for run in range(2):
            hold_probes(harness, comparison, run, look)
    assert noise.faults == []
    assert noise.turns > 2 * NOISE_SESSIONS
    assert noise.cancelled
    assert most > NOISE_SESSIONS * 3 // 4
    comparison.check(least=1200)
    harness.assert_nothing_is_held()


@pytest.mark.parametrize("tier", ["host", "dropped"])
def test_evicted_after_every_turn(
    alone: Alone, tally: Tally, start: Callable[..., EngineHarness], tier: str
) -> None:
    harness = start(host_cache_bytes=1 if tier == "dropped" else 64 << 20)
    comparison = Comparison(alone, tally)
    evicted = 0

    def evict() -> None:
        nonlocal evicted
        evicted += harness.evict_idle()
        harness.poison_free_blocks()
        assert harness.engine.statistics().blocks_used == 0

    hold_probes(harness, comparison, after_turn=evict)
    comparison.check(least=600)
    now = harness.engine.statistics()
    turns = sum(map(len, PROBES.values()))
    assert evicted == turns
    later = turns - len(PROBES)
    restored = {"host": now.restored_from_host, "dropped": now.restored_by_computing}
    assert restored == {"host": 0, "dropped": 0} | {tier: later}
    harness.assert_nothing_is_held()


@pytest.mark.parametrize("tier", ["host", "dropped"])
def test_in_a_pool_that_holds_a_few_sessions_only(
    alone: Alone,
    tally: Tally,
    start: Callable[..., EngineHarness],
    tier: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = alone.longest // BLOCK_TOKENS + 8
    harness = start(
        kv_cache_bytes=blocks * alone.block_bytes,
        host_cache_bytes=1 if tier == "dropped" else 64 << 20,
        prefill_chunk_tokens=64,
    )
    put_back = count_put_back(harness, monkeypatch)
    comparison = Comparison(alone, tally)
    for run in range(2):
        hold_probes(harness, comparison, run, harness.poison_free_blocks, together=True)
    comparison.check(least=1200)
    assert len(put_back) > 4
    now = harness.engine.statistics()
    if tier == "host":
        assert now.restored_from_host > len(PROBES)
    else:
        assert now.restored_by_computing > len(PROBES)
        assert now.evicted_to_host == 0
    harness.assert_nothing_is_held()


def count_put_back(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Sessions whose blocks are taken while they have a turn, as it happens."""
    put_back: list[Session] = []

    def spy(state: EngineState) -> None:
        evict = state.memory.evict

        def counted(session: Session) -> None:
            if session.id in state.lanes:
                put_back.append(session)
            evict(session)

        monkeypatch.setattr(state.memory, "evict", counted)

    harness.inspect(spy)
    return put_back


def test_sharing_with_many_sessions(
    alone: Alone, tally: Tally, start: Callable[..., EngineHarness]
) -> None:
    harness = start()
    comparison = Comparison(alone, tally)
    probe, sessions = "a picture", [f"viewer {number}" for number in range(24)]
    opened = harness.ask("first", None, [PICTURES[0]], start=True)[1]
    full = opened.num_input_tokens // BLOCK_TOKENS
    before = harness.engine.statistics()
    for turn, say in enumerate(PROBES[probe]):
        asked = [(each, submit(harness, each, say, start=turn == 0)) for each in sessions]
        if turn == 2:  # one goes another way, and back into nobody's answers
            diverging = harness.submit("first", "Is there a green star?", max_tokens=30)
        for session, pending in asked:
            assert comparison.same(probe, turn, heard(harness, session, pending))
        harness.check_state()
    now = harness.engine.statistics()
    assert now.prefix_cache_blocks - before.prefix_cache_blocks >= full * len(sessions)
    assert (now.images, now.image_hits) == (1, len(sessions))
    assert now.blocks_shared >= full
    comparison.check(least=24 * 60)
    quiet = start()
    quiet.ask("first", None, [PICTURES[0]], start=True)
    assert diverging.wait()[0] == quiet.ask("first", "Is there a green star?", max_tokens=30)[0]


def test_sessions_that_part_ways(
    alone: Alone, tally: Tally, start: Callable[..., EngineHarness]
) -> None:
    """Two probes begin alike; what one of them says after that is nothing to the other."""
    harness = start(prefill_chunk_tokens=16, host_cache_bytes=64 << 20)
    comparison = Comparison(alone, tally)
    pair = ("a picture", "the same picture again")
    for turn in range(3):
        asked = [
            (name, submit(harness, name, PROBES[name][turn], start=turn == 0)) for name in pair
        ]
        for name, pending in asked:
            assert comparison.same(name, turn, heard(harness, name, pending))
        # Coming back, each finds what the other has: their common beginning, and no more.
        harness.evict_idle(pair[turn % 2])
        harness.check_state()
    assert harness.engine.statistics().images == 1
    comparison.check(least=100)


def test_a_difference_that_is_no_tie_is_noticed(alone: Alone) -> None:
    said = alone.said["a picture"][0]
    ids, wanted = said.prompt, said.answer[0]
    best, gap = two_best(alone.checkpoint, ids, [PICTURES[0]])
    assert wanted in best
    assert gap > TIE
    (second,) = best - {wanted}
    for other in (second, 7):
        wrong = Said(said.prompt, [other, *said.answer[1:]], said.final)
        with pytest.raises(AssertionError, match="token 0"):
            Comparison(alone, Tally()).same("a picture", 0, wrong)
    assert Comparison(alone, Tally()).same("a picture", 0, said)
