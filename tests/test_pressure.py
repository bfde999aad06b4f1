"""What gives way when memory or time is short, what is shared, and what never is."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from llava_triton.delta import Delta
from llava_triton.engine import Engine, TurnRequest
from llava_triton.engine.block_pool import BlockPool
from llava_triton.engine.image_store import Image as StoredImage
from llava_triton.engine.image_store import ImageStore, digest_of
from llava_triton.engine.session import Session, SessionId
from llava_triton.errors import ErrorCode, SessionError
from llava_triton.paged_attention.interface import BLOCK_TOKENS
from llava_triton.sampling import SamplingParameters
from tests.checkpoints import tiny_llava
from tests.engine_harness import EngineHarness, Pending
from tests.properties import given, settings

AT_ONCE_SECONDS = 1.0
"""A refusal takes milliseconds; this much more for a machine that does other work too."""
HANG_SECONDS = 20.0
"""Nothing here takes this long where the engine's thread lives."""
PICTURES = [Image.new("RGB", (60, 60), (30 * number, 240 - 30 * number, 80)) for number in range(8)]
PICTURE_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """One turn."""

    text: str | None
    images: tuple[Image.Image, ...] = ()
    max_tokens: int = 20
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def submit(self, harness: EngineHarness, session_id: SessionId, **flags: Any) -> Pending:
        """Send it."""
        return harness.submit(
            session_id,
            self.text,
            self.images,
            max_tokens=self.max_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            **flags,
        )

    def wait(
        self, harness: EngineHarness, session_id: SessionId, **flags: Any
    ) -> tuple[str, Delta]:
        """Send it and wait for its answer."""
        return self.submit(harness, session_id, **flags).wait()


Start = Callable[..., EngineHarness]
Alone = Callable[..., list[str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: whatever a token attends to by mistake changes the answer."""
    folder = tmp_path_factory.mktemp("pressure") / "tiny"
    return tiny_llava(folder, text="mistral", kv_heads=2, image_size=56, seed=1)


@pytest.fixture(scope="module")
def quiet(checkpoint: Path) -> Iterator[EngineHarness]:
    """Room for everything; for right answers."""
    harness = EngineHarness(checkpoint)
    yield harness
    harness.shutdown()


@pytest.fixture
def alone(quiet: EngineHarness) -> Alone:
    """The answers to a conversation where nothing else is open."""

    def hold(*turns: Ask) -> list[str]:
        quiet.restart()
        return [turn.wait(quiet, "alone", start=index == 0)[0] for index, turn in enumerate(turns)]

    return hold


@pytest.fixture
def start(checkpoint: Path, quiet: EngineHarness) -> Iterator[Start]:
    """Starts engines; `blocks`, `pictures` and `host_pictures` limit their memories."""
    started: list[EngineHarness] = []

    def make(
        blocks: int | None = None,
        pictures: int | None = None,
        host_pictures: int | None = None,
        host_blocks: int | None = None,
        **limits: Any,
    ) -> EngineHarness:
        features = quiet.features(PICTURES[:1])
        assert features is not None
        one = features.numel() * features.itemsize
        if blocks is not None:
            limits["kv_cache_bytes"] = blocks * quiet.runner.block_bytes
        if host_blocks is not None:
            limits["host_cache_bytes"] = max(1, host_blocks * quiet.runner.block_bytes)
        if pictures is not None:
            limits["image_features_bytes"] = pictures * one
        if host_pictures is not None:
            limits["host_cache_bytes"] = host_pictures * one
        started.append(EngineHarness(checkpoint, **limits))
        return started[-1]

    yield make
    for harness in started:
        try:
            harness.check_books()
        finally:
            harness.shutdown()


def failure(pending: Pending) -> ErrorCode:
    with pytest.raises(SessionError) as caught:
        pending.wait()
    return caught.value.code


def resident(harness: EngineHarness) -> set[SessionId]:
    """Sessions that hold blocks."""

    def look(engine: Engine) -> set[SessionId]:
        return {each.id for each in engine._sessions.oldest_first() if each.key_values.blocks}

    return harness.on_engine(look)


def on_host(harness: EngineHarness) -> set[SessionId]:
    """Sessions whose keys and values lie in host memory."""

    def look(engine: Engine) -> set[SessionId]:
        return {each.id for each in engine._sessions.oldest_first() if each.key_values.host}

    return harness.on_engine(look)


def blocks_of(final: Delta) -> int:
    """Blocks that a conversation fills up to the end of an answer."""
    return -(-(final.num_input_tokens + final.num_output_tokens) // BLOCK_TOKENS)


def put_back(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> list[SessionId]:
    """Sessions that lose their blocks while they have a turn, as it happens."""
    ids: list[SessionId] = []

    def spy(engine: Engine) -> None:
        evict = engine._memory.evict

        def counted(session: Session) -> None:
            if session.id in engine._lanes:
                ids.append(session.id)
            evict(session)

        monkeypatch.setattr(engine._memory, "evict", counted)

    harness.on_engine(spy)
    return ids


# Keys and values under pressure.


def long_ask(word: str) -> Ask:
    """Its conversation begins like no other word's, and words of one token make it as long."""
    return Ask(f"{word} " * 40, max_tokens=9, ignore_eos=True)


def test_idle_sessions_leave_longest_unused_first(start: Start, quiet: EngineHarness) -> None:
    size = blocks_of(long_ask("red").wait(quiet, "size", start=True)[1])
    harness = start(blocks=3 * size + 1)
    for name in ("red", "green", "star"):
        long_ask(name).wait(harness, name, start=True)
    Ask("?", max_tokens=1).wait(harness, "red")
    assert resident(harness) == {"red", "green", "star"}
    long_ask("left").wait(harness, "left", start=True)
    assert resident(harness) == {"red", "star", "left"}
    assert on_host(harness) == {"green"}
    long_ask("large").wait(harness, "large", start=True)
    assert resident(harness) == {"red", "left", "large"}
    Ask("?", max_tokens=1).wait(harness, "green")
    assert resident(harness) == {"left", "large", "green"}
    assert on_host(harness) == {"red", "star"}


def test_the_oldest_copy_in_host_memory_is_dropped_first(
    start: Start, quiet: EngineHarness, alone: Alone
) -> None:
    size = blocks_of(long_ask("red").wait(quiet, "size", start=True)[1])
    harness = start(host_blocks=2 * size + 1)
    names = ("red", "green", "star")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
        harness.evict_idle(name)
    harness.poison_free_blocks()
    assert on_host(harness) == {"green", "star"}
    for name in names:
        assert Ask("?").wait(harness, name)[0] == alone(long_ask(name), Ask("?"))[-1]
    now = harness.engine.statistics()
    assert (now.evicted_to_host, now.evicted_by_dropping) == (3, 1)
    assert (now.restored_from_host, now.restored_by_computing) == (2, 1)
    assert now.host_bytes == 0


@pytest.mark.parametrize("host_blocks", [0, 1000])
def test_a_turn_never_fails_for_memory_that_idle_sessions_hold(
    start: Start, alone: Alone, host_blocks: int
) -> None:
    harness = start(blocks=24, host_blocks=host_blocks)
    names = ("red", "green", "star")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
    greedy = Ask("Tell me everything.", (PICTURES[0],), max_tokens=1000, ignore_eos=True)
    text, final = greedy.wait(harness, "greedy", start=True)
    assert final.num_input_tokens + final.num_output_tokens == 24 * BLOCK_TOKENS
    assert resident(harness) == {"greedy"}
    whole = Ask(greedy.text, greedy.images, final.num_output_tokens, ignore_eos=True)
    assert [text] == alone(whole)
    for name in names:
        assert Ask("?").wait(harness, name)[0] == alone(long_ask(name), Ask("?"))[-1]


@pytest.mark.parametrize("host_blocks", [0, 1000])
def test_long_turns_that_do_not_fit_together_all_finish(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch, host_blocks: int
) -> None:
    asks = {
        name: Ask(f"{name} {name}", (PICTURES[number],), max_tokens=250, ignore_eos=True)
        for number, name in enumerate(("red", "green", "star"))
    }
    harness = start(blocks=30, host_blocks=host_blocks, prefill_chunk_tokens=16)
    victims = put_back(harness, monkeypatch)
    with harness.held_device():  # until all of them are there
        turns = {name: ask.submit(harness, name, start=True) for name, ask in asks.items()}
    answers = {name: turn.wait()[0] for name, turn in turns.items()}
    assert answers == {name: alone(ask)[0] for name, ask in asks.items()}
    assert victims
    assert "red" not in victims  # the oldest turn always goes on
    now = harness.engine.statistics()
    if host_blocks:
        assert now.restored_from_host > 0
    else:
        assert now.restored_by_computing > 0


def test_a_turn_that_was_put_back_can_be_cancelled(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start(blocks=24)
    victims = put_back(harness, monkeypatch)
    opening = Ask("new new", (PICTURES[1],))
    opening.wait(harness, "new", start=True)
    with harness.held_device():
        oldest = Ask("old old", max_tokens=330, ignore_eos=True).submit(harness, "old", start=True)
        younger = Ask("go on", max_tokens=200, ignore_eos=True).submit(harness, "new")
    while "new" not in victims:
        assert not younger.events.get(timeout=60).is_final  # type: ignore[union-attr]
    harness.engine.cancel(younger.id)
    assert failure(younger) is ErrorCode.CANCELLED
    assert oldest.wait()[1].finish_reason == "length"
    assert Ask("And now?").wait(harness, "new")[0] == alone(opening, Ask("And now?"))[-1]


def test_what_a_turn_computed_itself_is_not_called_cached(
    start: Start, quiet: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it was put back in the middle of its prompt."""
    long = Ask("new " * 150, max_tokens=4, ignore_eos=True)
    prompt = long.wait(quiet, "size", start=True)[1].num_input_tokens
    harness = start(blocks=prompt // BLOCK_TOKENS + 5, prefill_chunk_tokens=1)
    victims = put_back(harness, monkeypatch)
    with harness.held_device():
        oldest = Ask("old", max_tokens=120, ignore_eos=True).submit(harness, "old", start=True)
        younger = long.submit(harness, "new", start=True)
    oldest.wait()
    _, final = younger.wait()
    assert "new" in victims
    assert final.num_cached_tokens == 0
    now = harness.engine.statistics()
    assert (now.prompt_tokens_reused, now.blocks_taken_over) == (0, 0)


def test_a_copy_to_host_memory_that_fails_is_nobody_elses_business(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = start()
    for name in ("red", "green"):
        long_ask(name).wait(harness, name, start=True)

    def broken(blocks: Sequence[int]) -> None:
        raise MemoryError("no host memory")

    with monkeypatch.context() as patch:
        patch.setattr(harness.runner.pages, "to_host", broken)
        harness.evict_idle("red")
        harness.poison_free_blocks()
        Ask("a step in which the copy fails").wait(harness, "new", start=True)
    with harness.held_device() as device:
        blocker = Ask("wait").submit(harness, "blocker", start=True)
        device.wait_until_busy()
        turns = {name: Ask("?").submit(harness, name) for name in ("red", "green")}
        device.go_on()
        blocker.wait()
        assert turns["green"].wait()[0] == alone(long_ask("green"), Ask("?"))[-1]
        try:
            text = turns["red"].wait()[0]
        except SessionError as error:
            assert error.code is ErrorCode.INTERNAL  # noqa: PT017
            text = Ask("?").wait(harness, "red")[0]
        assert text == alone(long_ask("red"), Ask("?"))[-1]


# Pictures under pressure.


def show(number: int) -> Ask:
    return Ask("What is it?", (PICTURES[number],), max_tokens=8)


def fill(harness: EngineHarness) -> None:
    """Four sessions, each with a picture of its own: two on the device, two on the host."""
    for number in range(4):
        show(number).wait(harness, number, start=True)


def test_pictures_go_to_host_memory_and_only_then_are_new_ones_refused(
    start: Start, alone: Alone
) -> None:
    harness = start(pictures=2, host_pictures=2)
    evicted = []
    for number in range(4):
        show(number).wait(harness, number, start=True)
        evicted.append(harness.engine.statistics().images_evicted)
    assert evicted == [0, 0, 1, 2]
    assert failure(show(4).submit(harness, "new", start=True)) is ErrorCode.UNAVAILABLE
    assert failure(Ask("?").submit(harness, "new")) is ErrorCode.NOT_FOUND
    assert failure(show(4).submit(harness, 0)) is ErrorCode.UNAVAILABLE
    two = Ask("?", (PICTURES[0], PICTURES[5]))
    assert failure(two.submit(harness, 0)) is ErrorCode.UNAVAILABLE
    harness.check_books()
    assert harness.engine.statistics().images == 4
    # What is there already can be shown again, and everybody can go on: also where keys and values
    # have to be computed from features in host memory.
    assert show(0).wait(harness, "same", start=True)[0] == alone(show(0))[0]
    harness.evict_idle()
    for number in range(4):
        assert Ask("?").wait(harness, number)[0] == alone(show(number), Ask("?"))[-1]
    harness.engine.close(1)
    assert show(4).wait(harness, "new", start=True)[0] == alone(show(4))[0]


def test_a_refused_opening_leaves_the_open_session_alone(start: Start, alone: Alone) -> None:
    harness = start(pictures=2, host_pictures=2)
    fill(harness)
    two = Ask("What is it?", (PICTURES[4], PICTURES[5]))
    assert failure(two.submit(harness, 0, start=True)) is ErrorCode.UNAVAILABLE
    assert Ask("?").wait(harness, 0)[0] == alone(show(0), Ask("?"))[-1]


def test_the_longest_unused_picture_goes_first(start: Start) -> None:
    harness = start(pictures=2, host_pictures=2)
    for number in (0, 1):
        show(number).wait(harness, number, start=True)
    show(0).wait(harness, "again", start=True)
    show(2).wait(harness, 2, start=True)
    moved = harness.on_engine(lambda engine: list(engine._images._on_host))
    assert moved == [harness.session(1).images[0].digest]


def test_a_refused_picture_is_a_refused_turn(start: Start) -> None:
    harness = start(pictures=2, host_pictures=2)
    fill(harness)
    before = harness.engine.statistics()
    failure(show(4).submit(harness, "new", start=True))
    failure(show(4).submit(harness, 0))
    now = harness.engine.statistics()
    assert now.turns_refused - before.turns_refused == 2
    assert now.turns_failed == before.turns_failed
    assert now.sessions_opened == before.sessions_opened


# While the device is busy.


@pytest.mark.parametrize(
    ("code", "turn"),
    [
        pytest.param(ErrorCode.UNAVAILABLE, ("third", Ask("?"), True), id="a session too many"),
        pytest.param(ErrorCode.UNAVAILABLE, ("busy", Ask("?"), False), id="a turn too many"),
        pytest.param(ErrorCode.NOT_FOUND, ("nobody", Ask("?"), False), id="an unknown session"),
        pytest.param(ErrorCode.INVALID_ARG, ("idle", Ask(None), False), id="nothing said"),
        pytest.param(ErrorCode.UNAVAILABLE, ("idle", show(1), False), id="a picture too many"),
    ],
)
def test_refusals_do_not_wait_for_the_device(
    start: Start, code: ErrorCode, turn: tuple[str, Ask, bool]
) -> None:
    session_id, ask, opens = turn
    limits = {"max_sessions": 2} if opens else {}
    harness = start(**limits, max_queued_turns=4, pictures=1, host_blocks=0)
    show(0).wait(harness, "idle", start=True)
    with harness.held_device() as device:
        waiting = [Ask("Hello!").submit(harness, "busy", start=True)]
        device.wait_until_busy()
        waiting += [Ask("And?").submit(harness, "busy") for _ in range(2)]
        if session_id == "busy":
            waiting.append(Ask("And?").submit(harness, "busy"))
        began = time.monotonic()
        assert failure(ask.submit(harness, session_id, start=opens)) is code
        assert time.monotonic() - began < AT_ONCE_SECONDS
        assert not device.going
    for pending in waiting:
        pending.wait()


def test_a_turn_that_takes_long_gives_signs_of_life(start: Start, alone: Alone) -> None:
    harness = start()
    ask = Ask("How long?", (PICTURES[0],))
    with harness.held_device() as device:
        pending = ask.submit(harness, "s", start=True)
        pieces = pending.deltas()
        signs = [next(pieces) for _ in range(3)]
        assert not device.going
    assert {sign.text for sign in signs} == {""}
    assert not any(sign.is_final for sign in signs)
    assert "".join(piece.text for piece in pieces) == alone(ask)[0]


# Shared blocks.


def shared_blocks(harness: EngineHarness, one: SessionId, other: SessionId) -> int:
    return len(
        set(harness.session(one).key_values.blocks) & set(harness.session(other).key_values.blocks)
    )


def ends_in_a_shared_block(harness: EngineHarness, session_id: SessionId) -> bool:
    """Whether what a session keeps ends in the middle of a block that others hold as well."""

    def look(engine: Engine) -> bool:
        kv, pool = engine._sessions.get(session_id).key_values, engine._memory.pool
        index, inside = divmod(len(kv.ids), BLOCK_TOKENS)
        return inside > 0 and pool.is_shared(kv.blocks[index])

    return harness.on_engine(look)


def test_cut_back_by_a_cancelled_turn_into_a_shared_block(start: Start, alone: Alone) -> None:
    harness = start()
    opening, doomed = show(0), Ask("a b c d e f g h " * 5, max_tokens=850, ignore_eos=True)
    opening.wait(harness, "one", start=True)
    running = doomed.submit(harness, "one")
    next(running.deltas())
    opening.wait(harness, "two", start=True)
    short = Ask(doomed.text, max_tokens=5, ignore_eos=True)
    assert short.wait(harness, "two")[0] == alone(opening, short)[-1]
    assert shared_blocks(harness, "one", "two") > 3  # blocks of the turn that is under way
    harness.engine.cancel(running.id)
    assert failure(running) is ErrorCode.CANCELLED
    assert ends_in_a_shared_block(harness, "one")
    before = harness.engine.statistics().blocks_copied
    other = Ask("z y x w v u " * 5)
    assert other.wait(harness, "one")[0] == alone(opening, other)[-1]
    assert harness.engine.statistics().blocks_copied == before + 1
    later = Ask("And what was that?")
    assert later.wait(harness, "two")[0] == alone(opening, short, later)[-1]
    assert later.wait(harness, "one")[0] == alone(opening, other, later)[-1]


def test_cut_back_by_a_stop_string_into_a_shared_block(start: Start, alone: Alone) -> None:
    harness = start()
    whole = Ask("What is it?", (PICTURES[0],), max_tokens=90, ignore_eos=True)
    said = alone(whole)[0]
    # Late words: the model says all of them before they are known to be the stop string.
    ending = said[-110:-10]
    assert said.count(ending) == 1
    stopped = Ask(whole.text, whole.images, 90, stop=(ending,), ignore_eos=True)
    text, final = stopped.wait(harness, "one", start=True)
    assert (text, final.finish_reason) == (said[:-110], "stop")
    whole.wait(harness, "two", start=True)
    # Dropped, it finds all that the other has computed: also what that one must not have said.
    harness.evict_idle("two")
    later = Ask("And what was that?")
    assert later.wait(harness, "two")[0] == alone(whole, later)[-1]
    kept = len(harness.history("one"))
    assert shared_blocks(harness, "one", "two") * BLOCK_TOKENS > kept
    before = harness.engine.statistics().blocks_copied
    other = Ask("z y x w v u " * 5)
    assert other.wait(harness, "one")[0] == alone(stopped, other)[-1]
    assert harness.engine.statistics().blocks_copied == before + 1
    assert later.wait(harness, "two")[0] == alone(whole, later, later)[-1]


def test_a_session_that_comes_back_shares_again(start: Start, alone: Alone) -> None:
    harness = start()
    opening = show(0)
    for name in ("one", "two"):
        opening.wait(harness, name, start=True)
    shared = shared_blocks(harness, "one", "two")
    assert shared > 0
    harness.evict_idle("one")
    harness.poison_free_blocks()
    assert Ask("?").wait(harness, "one")[0] == alone(opening, Ask("?"))[-1]
    assert shared_blocks(harness, "one", "two") == shared
    assert harness.engine.statistics().restored_from_host == 1


# What is never shared.


def test_pictures_that_differ_in_one_pixel(start: Start, alone: Alone) -> None:
    harness = start()
    other = PICTURES[0].copy()
    other.putpixel((30, 30), (1, 0, 0))
    first, second = Ask("What is it?", (PICTURES[0],)), Ask("What is it?", (other,))
    first.wait(harness, "one", start=True)
    text, final = second.wait(harness, "two", start=True)
    assert final.num_cached_tokens == 0
    assert text == alone(second)[0]
    now = harness.engine.statistics()
    assert (now.images, now.image_hits, now.blocks_taken_over) == (2, 0, 0)


def test_features_that_differ_in_one_bit(start: Start) -> None:
    harness = start()
    features = harness.features(PICTURES[:1])
    assert features is not None
    for number, place in enumerate((None, 0, -1)):
        other = features.clone()
        if place is not None:
            other.view(torch.int32).view(-1)[place] ^= 1
        pending = Pending()
        request = TurnRequest(
            number,
            start=True,
            text="What is it?",
            image_features=other,
            sampling=SamplingParameters(max_tokens=2),
        )
        harness.engine.submit(request, pending.events.put)
        assert pending.wait()[1].num_cached_tokens == 0
    now = harness.engine.statistics()
    assert (now.images, now.image_hits, now.blocks_taken_over) == (3, 0, 0)


def test_equal_numbers_of_another_type_or_shape_are_other_pictures() -> None:
    features = torch.zeros(4, 6)
    others = [features.half(), features.view(6, 4), features.view(torch.int32)]
    assert len({digest_of(each) for each in (features, *others)}) == 4
    assert digest_of(features) == digest_of(torch.zeros(6, 4).t().contiguous())
    transposed = torch.arange(24.0).view(6, 4).t()
    assert digest_of(transposed) == digest_of(transposed.contiguous())


def test_the_same_picture_at_another_place_of_the_prompt(start: Start, alone: Alone) -> None:
    harness = start()
    one, two = PICTURES[:2]
    conversations: list[tuple[list[Ask], int]] = [
        ([Ask("What is it?", (one, two))], 0),
        ([Ask("What is it?", (two, one))], 0),  # the very same tokens
        ([Ask("What is it?", (one, one))], BLOCK_TOKENS),
        ([Ask("What is it?", (one,))], BLOCK_TOKENS),
        ([Ask("Hello!"), Ask("What is it?", (one,))], 0),
    ]
    for number, (turns, most_shared) in enumerate(conversations):
        before = harness.engine.statistics().blocks_taken_over
        texts = [
            turn.wait(harness, number, start=index == 0)[0] for index, turn in enumerate(turns)
        ]
        taken_over = harness.engine.statistics().blocks_taken_over - before
        assert taken_over * BLOCK_TOKENS == most_shared
        assert texts == alone(*turns)
    assert harness.engine.statistics().images == 2


def test_equal_blocks_behind_another_beginning(start: Start, alone: Alone) -> None:
    harness = start()
    same = Ask("star " * 60)
    for name in ("red", "green"):
        long_ask(name).wait(harness, name, start=True)
    for name in ("red", "green"):
        assert same.wait(harness, name)[0] == alone(long_ask(name), same)[-1]
    red, green = harness.history("red"), harness.history("green")
    equal = slice(5 * BLOCK_TOKENS, 7 * BLOCK_TOKENS)
    assert red[equal] == green[equal]
    assert harness.engine.statistics().blocks_taken_over == 0


def test_a_whole_prompt_that_is_known_leaves_a_token_to_compute(
    start: Start, alone: Alone, quiet: EngineHarness
) -> None:
    """Also where it ends with a block: the last token's logits begin the answer."""

    def ask(words: int) -> Ask:
        return Ask("red " * words)

    lengths = {
        words: ask(words).wait(quiet, words, start=True)[1].num_input_tokens
        for words in range(30, 30 + BLOCK_TOKENS)
    }
    (words,) = (words for words, length in lengths.items() if length % BLOCK_TOKENS == 0)
    harness = start()
    for name, known in (("one", 0), ("two", lengths[words] - BLOCK_TOKENS)):
        text, final = ask(words).wait(harness, name, start=True)
        assert text == alone(ask(words))[0]
        assert final.num_cached_tokens == known


def test_nothing_is_found_after_a_cancelled_prompt_but_what_was_computed(
    start: Start, alone: Alone
) -> None:
    """Cancelled while the device computes it, a block is not published."""
    harness = start()
    ask = Ask("What is it? " * 9, (PICTURES[0],))
    with harness.held_device() as device:
        doomed = ask.submit(harness, "one", start=True)
        device.wait_until_busy()
        harness.engine.cancel(doomed.id)
        assert failure(doomed) is ErrorCode.CANCELLED
        other = Ask("Something else " * 20, (PICTURES[1],)).submit(harness, "two", start=True)
        same = ask.submit(harness, "three", start=True)
    other.wait()
    text, final = same.wait()
    assert final.num_cached_tokens == 0
    assert text == alone(ask)[0]


# Steps that fail.


def test_turns_of_a_failing_step_are_tried_alone(start: Start, alone: Alone) -> None:
    harness = start()
    names = ("red", "green", "star")
    for name in names:
        long_ask(name).wait(harness, name, start=True)
    going_on = Ask("Go on", max_tokens=60, ignore_eos=True)
    with harness.failing_step(turns=len(names)) as step:
        turns = {name: going_on.submit(harness, name) for name in names}
        answers = {name: turn.wait()[0] for name, turn in turns.items()}
    assert step.turns == len(names)
    assert answers == {name: alone(long_ask(name), going_on)[-1] for name in names}
    assert harness.engine.statistics().turns_failed == 0


def test_a_failing_step_of_one_turn_fails_it(start: Start, alone: Alone) -> None:
    harness = start()
    opening = show(0)
    opening.wait(harness, "s", start=True)
    with harness.failing_step() as step:
        assert failure(show(1).submit(harness, "s")) is ErrorCode.INTERNAL
    assert step.turns == 1
    assert (
        Ask("?", (PICTURES[2],)).wait(harness, "s")[0]
        == alone(opening, Ask("?", (PICTURES[2],)))[-1]
    )
    assert harness.engine.statistics().images == 2


# Turns of one session among one another.


@pytest.mark.parametrize("images", [(), (PICTURES[0],)], ids=["text", "picture"])
def test_a_cancelled_end_waits_for_the_turn_before_it(
    start: Start,
    alone: Alone,
    images: tuple[Image.Image, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.engine_harness.PATIENCE_SECONDS", HANG_SECONDS)
    harness = start()
    long = Ask("Go on", images, max_tokens=300, ignore_eos=True)
    running = long.submit(harness, "s", start=True)
    next(running.deltas())
    ending = Ask("Bye").submit(harness, "s", end=True)
    harness.engine.cancel(ending.id)
    assert failure(ending) is ErrorCode.CANCELLED
    harness.check_books()
    assert running.wait()[1].finish_reason == "length"
    assert Ask("?").wait(harness, "other", start=True)[0] == alone(Ask("?"))[0]
    assert failure(Ask("?").submit(harness, "s")) is ErrorCode.NOT_FOUND
    harness.engine.close("other")
    harness.assert_nothing_is_held()


def test_every_turn_has_one_outcome(start: Start) -> None:
    """Also an END that is cancelled, though something ends the session in its place."""
    harness = start()
    running = Ask("Go on", max_tokens=300, ignore_eos=True).submit(harness, "s", start=True)
    next(running.deltas())
    ending = Ask("Bye").submit(harness, "s", end=True)
    harness.engine.cancel(ending.id)
    assert failure(ending) is ErrorCode.CANCELLED
    running.wait()
    assert failure(Ask("?").submit(harness, "s")) is ErrorCode.NOT_FOUND
    now = harness.engine.statistics()
    assert (now.turns_completed, now.turns_cancelled) == (1, 1)
    assert (now.turns_refused, now.turns_failed) == (1, 0)


# The books themselves.


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("aafprw"), st.integers(0, 11))))
@settings(max_examples=300)
def test_block_pool(blocks: int, operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(blocks)
    holders: Counter[int] = Counter()
    published: dict[bytes, int] = {}
    freed: OrderedDict[int, None] = OrderedDict()
    """Free blocks that are published, longest free first."""
    for operation, number in operations:
        held = sorted(holders)
        key = bytes([number % 4])
        if operation == "a":
            count = number % 4
            blank = blocks - len(held) - len(freed)
            taken = pool.allocate(count)
            if count > blocks - len(held):
                assert taken is None
                continue
            assert taken is not None
            assert len(set(taken)) == count
            assert not set(taken) & set(held)
            lost = list(freed)[: max(0, count - blank)]
            assert set(lost) == set(taken) & set(freed)
            for block in lost:
                del freed[block]
                published = {key: each for key, each in published.items() if each != block}
            holders.update(taken)
        elif operation == "f":
            found = pool.find(key)
            assert found == published.get(key)
            if found is not None:
                freed.pop(found, None)
                holders[found] += 1
        elif operation == "p" and held:
            block = held[number % len(held)]
            pool.publish(block, key)
            if key not in published and block not in published.values():
                published[key] = block
        elif operation == "r" and held:
            block = held[number % len(held)]
            pool.release(block)
            holders[block] -= 1
            if not holders[block]:
                del holders[block]
                if block in published.values():
                    freed[block] = None
        elif operation == "w" and held:
            block = held[number % len(held)]
            pool.withdraw(block)
            published = {key: each for key, each in published.items() if each != block}
        assert pool.holders() == [holders[block] for block in range(blocks)]
        assert pool.free == blocks - len(holders)
        assert pool.shared == sum(count > 1 for count in holders.values())
        assert all(pool.is_shared(block) == (holders[block] > 1) for block in range(blocks))


def test_a_free_block_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="free already"):
        BlockPool(3).release(1)


@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40),
)
@settings(max_examples=300)
def test_image_store(on_device: int, on_host: int, operations: list[tuple[bool, int]]) -> None:
    features = torch.arange(6.0).view(2, 3)
    one = features.numel() * features.itemsize
    store = ImageStore(lambda tensor: tensor.clone(), on_device * one, on_host * one)
    held: list[StoredImage] = []
    hits = 0
    for is_new, number in operations:
        kinds = {image.digest for image in held}
        if is_new:
            digest = digest_of(features + number)
            hits += digest in kinds
            if digest in kinds or (len(kinds) < on_device + on_host and on_device):
                held.append(store.hold(digest, features + number))
            else:
                before = (len(store), store.device_bytes, store.host_bytes, store.evictions)
                with pytest.raises(SessionError, match="memory for pictures is full") as caught:
                    store.hold(digest, features + number)
                assert caught.value.code is ErrorCode.UNAVAILABLE
                after = (len(store), store.device_bytes, store.host_bytes, store.evictions)
                assert after == before
        elif held:
            store.release(held.pop(number % len(held)))
        counts = Counter(image.digest for image in held)
        assert len(store) == len(counts)
        assert store.hits == hits
        assert store.device_bytes + store.host_bytes == len(counts) * one
        assert store.device_bytes <= on_device * one
        assert store.host_bytes <= on_host * one
        for image in held:
            assert image.holders == counts[image.digest]
            assert digest_of(image.features) == image.digest
