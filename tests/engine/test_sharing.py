"""What sessions share, and what they never do."""

from __future__ import annotations

import gc
import threading
import weakref

import torch

from llava_triton.contract.errors import ErrorCode
from llava_triton.engine import TurnRequest
from llava_triton.engine.image_store import digest_of
from llava_triton.engine.session import SessionId
from llava_triton.engine.state import EngineState
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.sampling import SamplingParameters
from tests.engine_harness import EngineHarness, Pending
from tests.small_engine import (
    HANG_SECONDS,
    PICTURES,
    Alone,
    Ask,
    Start,
    failure,
    long_ask,
    show,
)

# Shared blocks.


def shared_blocks(harness: EngineHarness, one: SessionId, other: SessionId) -> int:
    return len(
        set(harness.session(one).key_values.blocks) & set(harness.session(other).key_values.blocks)
    )


def ends_in_a_shared_block(harness: EngineHarness, session_id: SessionId) -> bool:
    """Whether what a session keeps ends in the middle of a block that others hold as well."""

    def look(state: EngineState) -> bool:
        kv, pool = state.sessions.get(session_id).key_values, state.memory.pool
        index, inside = divmod(kv.computed, BLOCK_TOKENS)
        return inside > 0 and pool.is_shared(kv.blocks[index])

    return harness.inspect(look)


def test_cut_back_by_a_cancelled_turn_into_a_shared_block(start: Start, alone: Alone) -> None:
    harness = start()
    opening, doomed = show(0), Ask("a b c d e f g h " * 5, max_tokens=850, ignore_eos=True)
    opening.wait(harness, "one", start=True)
    running = doomed.submit(harness, "one")
    next(running.deltas())
    opening.wait(harness, "two", start=True)
    short = Ask(doomed.text, max_tokens=5, ignore_eos=True)
    assert short.wait(harness, "two")[0] == alone(opening, short)[-1]
    assert shared_blocks(harness, "one", "two") > 3  # blocks of the turn that is in flight
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
    assert (now.images, now.image_hits, now.prefix_cache_blocks) == (2, 0, 0)


def test_features_that_differ_in_one_bit(start: Start) -> None:
    harness = start()
    (features,) = harness.features(PICTURES[:1])
    for number, place in enumerate((None, 0, -1)):
        other = features.clone()
        if place is not None:
            other.view(torch.int32).view(-1)[place] ^= 1
        pending = Pending()
        request = TurnRequest(
            number,
            start=True,
            text="What is it?",
            image_features=(other,),
            sampling=SamplingParameters(max_tokens=2),
        )
        harness.engine.submit(request, pending.events.put)
        assert pending.wait()[1].num_cached_tokens == 0
    now = harness.engine.statistics()
    assert (now.images, now.image_hits, now.prefix_cache_blocks) == (3, 0, 0)


def test_a_running_turn_holds_no_second_copy_of_its_pictures(start: Start) -> None:
    harness = start()
    asked = TurnRequest(
        session_id="s",
        start=True,
        text="Go on",
        image_features=tuple(each.clone() for each in harness.features(PICTURES[:2])),
        sampling=SamplingParameters(max_tokens=300, ignore_eos=True),
    )
    features = [weakref.ref(each) for each in asked.image_features]
    began = threading.Event()
    harness.engine.submit(asked, lambda _: began.set())
    del asked
    assert began.wait(HANG_SECONDS)
    harness.inspect(lambda engine: None)  # what began it is over
    gc.collect()
    assert [each() for each in features] == [None, None]
    assert harness.engine.statistics().images == 2


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
        before = harness.engine.statistics().prefix_cache_blocks
        texts = [
            turn.wait(harness, number, start=index == 0)[0] for index, turn in enumerate(turns)
        ]
        taken_over = harness.engine.statistics().prefix_cache_blocks - before
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
    assert harness.engine.statistics().prefix_cache_blocks == 0


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
