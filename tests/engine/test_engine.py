"""The engine against plain transformers, and the session rules, without a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.model.text_model import TextModel
from tests.checkpoints import tiny_llava
from tests.engine_harness import EngineHarness, Pending
from tests.reference import TransformersChat

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "checkpoint"
QUESTIONS = (
    "How many shapes are there?",
    "What is in the picture?",
    "Is there a red circle?",
    "And what about é, 漢字 and 🙂?",
)


def picture(color: str, size: tuple[int, int] = (120, 90)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.paste(Image.new("RGB", (40, 40), color), (30, 20))
    return image


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo checkpoint, and random ones with grouped-query attention and other image sizes."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "demo": DEMO,
        "mistral": tiny_llava(root / "mistral", text="mistral", kv_heads=2, image_size=56, seed=1),
        "qwen2": tiny_llava(root / "qwen2", text="qwen2", kv_heads=1, image_size=112, seed=2),
    }


@pytest.fixture
def harness() -> Iterator[EngineHarness]:
    harness = EngineHarness(DEMO)
    yield harness
    harness.shutdown()


def failure(pending: Pending) -> ErrorCode:
    with pytest.raises(SessionError) as caught:
        pending.wait()
    return caught.value.code


@pytest.mark.parametrize("name", ["demo", "mistral", "qwen2"])
@pytest.mark.parametrize("chunk", [16, 512])
def test_conversations_equal_transformers(
    checkpoints: dict[str, Path], name: str, chunk: int
) -> None:
    reference = TransformersChat(checkpoints[name])
    harness = EngineHarness(checkpoints[name], prefill_chunk_tokens=chunk)
    try:
        for index, question in enumerate(QUESTIONS):
            images = [picture("red")] if index == 0 else []
            if index == 2:
                images = [picture("blue"), picture("green")]
            expected = reference.ask(question, images, max_tokens=24)
            text, final = harness.ask("s", question, images, start=index == 0, max_tokens=24)
            assert text == reference.decode(expected)
            assert final.num_output_tokens == len(expected)
    finally:
        harness.shutdown()


def test_later_turns_reuse_everything_but_one_token(harness: EngineHarness) -> None:
    _, first = harness.ask("s", QUESTIONS[0], [picture("red")], start=True)
    assert first.num_cached_tokens == 0
    before = first.num_input_tokens + first.num_output_tokens
    _, second = harness.ask("s", QUESTIONS[1], max_tokens=3)
    assert second.finish_reason == "length"
    assert second.num_cached_tokens >= before - 1
    before = second.num_input_tokens + second.num_output_tokens
    _, third = harness.ask("s", QUESTIONS[2])
    assert third.num_cached_tokens == before - 1  # the last token of a cut answer was never fed


def test_opening_without_text_prefills_the_image(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    text, opened = harness.ask("s", None, [picture("red")], start=True)
    assert (text, opened.finish_reason, opened.num_output_tokens) == ("", "prefilled", 0)
    text, answered = harness.ask("s", QUESTIONS[0])
    assert text == reference.answer(QUESTIONS[0], [picture("red")])
    assert answered.num_cached_tokens == opened.num_input_tokens


def test_images_without_text_wait_for_the_question(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    assert harness.ask("s", start=True)[1].num_input_tokens == 0
    harness.ask("s", None, [picture("red")])
    harness.ask("s", None, [picture("blue")])
    images = [picture("red"), picture("blue")]
    assert harness.ask("s", QUESTIONS[1])[0] == reference.answer(QUESTIONS[1], images)


def test_text_only_conversation(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    assert harness.ask("s", "Hello!", start=True)[0] == reference.answer("Hello!")
    assert harness.ask("s", "Who?")[0] == reference.answer("Who?")


def test_sessions_advance_together(harness: EngineHarness) -> None:
    first = harness.submit("a", "Hello!", start=True, max_tokens=300, ignore_eos=True)
    next(first.deltas())
    second = harness.submit("b", "Hello!", start=True, max_tokens=5, ignore_eos=True)
    second.wait()
    assert harness.engine.statistics().turns_in_flight == 1  # a is still being answered
    assert first.wait()[1].finish_reason == "length"


def test_turns_of_one_session_run_in_order(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    images = [picture("red")]
    turns = [harness.submit("s", QUESTIONS[0], images, start=True)]
    turns += [harness.submit("s", question) for question in QUESTIONS[1:]]
    expected = [reference.answer(QUESTIONS[0], images)]
    expected += [reference.answer(question) for question in QUESTIONS[1:]]
    assert [turn.wait()[0] for turn in turns] == expected


def test_a_cancelled_turn_leaves_no_trace(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    images = [picture("red")]
    first = harness.ask("s", QUESTIONS[0], images, start=True)
    reference.ask(QUESTIONS[0], images)
    doomed = harness.submit("s", "Forget me", [picture("blue")], max_tokens=800, ignore_eos=True)
    next(doomed.deltas())
    waiting = harness.submit("s", "And me")
    harness.engine.cancel(waiting.id)
    harness.engine.cancel(doomed.id)
    assert failure(doomed) is ErrorCode.CANCELLED
    assert failure(waiting) is ErrorCode.CANCELLED
    text, after = harness.ask("s", QUESTIONS[1])
    assert text == reference.answer(QUESTIONS[1])
    assert after.num_cached_tokens >= first[1].num_input_tokens + first[1].num_output_tokens - 1
    assert harness.engine.statistics().turns_cancelled == 2


def test_a_cancelled_opening_opens_nothing(harness: EngineHarness) -> None:
    opening = harness.submit("s", "Hello!", start=True, max_tokens=900, ignore_eos=True)
    next(opening.deltas())
    harness.engine.cancel(opening.id)
    assert failure(opening) is ErrorCode.CANCELLED
    assert harness.engine.statistics().sessions_open == 0
    assert failure(harness.submit("s", "Still there?")) is ErrorCode.NOT_FOUND


def test_a_failing_step_fails_one_turn_only(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = TransformersChat(DEMO)
    images = [picture("red")]
    harness.ask("s", QUESTIONS[0], images, start=True)
    reference.ask(QUESTIONS[0], images)

    def broken(*_: Any) -> None:  # keys and values are written by then
        raise RuntimeError("device lost a bit")

    with monkeypatch.context() as patch:
        patch.setattr(TextModel, "logits", broken)
        assert failure(harness.submit("s", QUESTIONS[1])) is ErrorCode.INTERNAL
    assert harness.ask("s", QUESTIONS[1])[0] == reference.answer(QUESTIONS[1])


def test_end_answers_and_then_frees(harness: EngineHarness) -> None:
    harness.ask("s", "Hello!", start=True)
    text, final = harness.ask("s", "Bye?", end=True)
    assert text
    assert final.finish_reason == "stop"
    assert harness.engine.statistics().sessions_open == 0
    assert failure(harness.submit("s", "Hello?")) is ErrorCode.NOT_FOUND


def test_end_without_text_only_closes(harness: EngineHarness) -> None:
    harness.ask("s", "Hello!", start=True, max_tokens=2)
    assert harness.ask("s", end=True)[1].finish_reason == "closed"
    assert harness.engine.statistics().sessions_open == 0


def test_a_start_on_an_open_session_begins_anew(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    harness.ask("s", QUESTIONS[1], [picture("red")], start=True)
    text, final = harness.ask("s", QUESTIONS[1], [picture("blue")], start=True)
    assert text == reference.answer(QUESTIONS[1], [picture("blue")])
    assert final.num_cached_tokens == 0
    assert harness.engine.statistics().sessions_open == 1


def test_a_bad_start_leaves_the_open_session_alone(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    harness.ask("s", QUESTIONS[0], [picture("red")], start=True)
    reference.ask(QUESTIONS[0], [picture("red")])
    assert failure(harness.submit("s", "long " * 2000, start=True)) is ErrorCode.INVALID_ARG
    assert harness.ask("s", QUESTIONS[1])[0] == reference.answer(QUESTIONS[1])


def test_an_integer_and_its_digits_are_two_sessions(harness: EngineHarness) -> None:
    harness.ask(7, "Hello!", start=True)
    assert failure(harness.submit("7", "Hello?")) is ErrorCode.NOT_FOUND


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("word " * 2000, "context is 1024"),
        (None, "neither text_input nor image"),
    ],
)
def test_bad_turns_change_nothing(harness: EngineHarness, text: str | None, sentence: str) -> None:
    reference = TransformersChat(DEMO)
    harness.ask("s", QUESTIONS[0], [picture("red")], start=True)
    reference.ask(QUESTIONS[0], [picture("red")])
    with pytest.raises(SessionError, match=sentence):
        harness.ask("s", text)
    assert harness.ask("s", QUESTIONS[1])[0] == reference.answer(QUESTIONS[1])


def test_sessions_expire(harness: EngineHarness) -> None:
    harness.ask("idle", "Hello!", start=True)
    harness.clock.now += 1199.0
    harness.ask("busy", "Hello!", start=True)
    assert harness.ask("idle", "Still there?")[0]
    harness.clock.now += 1200.0
    assert failure(harness.submit("busy", "Still there?")) is ErrorCode.NOT_FOUND
    assert failure(harness.submit("idle", "Still there?")) is ErrorCode.NOT_FOUND
    assert harness.engine.statistics().sessions_expired == 2
    assert sorted(map(str, harness.expired)) == ["busy", "idle"]


def test_a_session_ends_after_its_lifetime() -> None:
    harness = EngineHarness(DEMO, session_idle_seconds=60.0, session_lifetime_seconds=100.0)
    try:
        harness.ask("s", "Hello!", start=True)
        harness.clock.now += 50.0
        harness.ask("s", "Hello?")
        harness.clock.now += 50.0
        assert failure(harness.submit("s", "Hello?")) is ErrorCode.NOT_FOUND
    finally:
        harness.shutdown()


def test_a_full_engine_refuses_new_sessions_only() -> None:
    harness = EngineHarness(DEMO, max_sessions=2)
    try:
        harness.ask("a", "Hello!", start=True)
        harness.ask("b", "Hello!", start=True)
        assert failure(harness.submit("c", "Hello!", start=True)) is ErrorCode.UNAVAILABLE
        assert harness.ask("a", "Hello?")[0]
        assert harness.ask("a", "Hello!", start=True)[0]  # takes its own place again
        harness.ask("b", end=True)
        assert harness.ask("c", "Hello!", start=True)[0]
    finally:
        harness.shutdown()


def test_a_full_queue_refuses_at_once() -> None:
    harness = EngineHarness(DEMO, max_queued_turns=2)
    try:
        endless = harness.submit("a", "Hello!", start=True, max_tokens=900, ignore_eos=True)
        next(endless.deltas())
        harness.submit("a", "Next")
        assert failure(harness.submit("a", "One more")) is ErrorCode.UNAVAILABLE
        harness.engine.close("a")
        assert failure(endless) is ErrorCode.CANCELLED
        assert harness.ask("b", "Hello!", start=True)[0]
    finally:
        harness.shutdown()


def test_what_a_stop_string_cut_off_is_not_in_the_history(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    images = [picture("red")]
    whole = reference.answer(QUESTIONS[1], images)
    stop = whole[len(whole) // 2 :][:4]
    shown = whole[: whole.index(stop)]
    text, final = harness.ask("s", QUESTIONS[1], images, start=True, stop=(stop,))
    assert (text, final.finish_reason) == (shown, "stop")
    reference.restart()
    reference.say(QUESTIONS[1], images, answer=shown)
    assert harness.ask("s", QUESTIONS[0])[0] == reference.answer(QUESTIONS[0])


def test_a_stop_string_in_the_first_word(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    whole = reference.answer("Hello!")
    text, _ = harness.ask("s", "Hello!", start=True, stop=(whole[3:8],))
    assert text == whole[:3]
    reference.restart()
    reference.say("Hello!", answer=whole[:3])
    _, final = harness.ask("s", "Hello?")
    reference.ask("Hello?")
    assert final.num_input_tokens + final.num_output_tokens == reference.num_tokens


def test_a_picture_that_cannot_be_placed_fails_its_turn_only(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, is_broken = harness.runner.features_on_device, threading.Event()

    def placed(features: Tensor) -> Tensor:
        if is_broken.is_set():
            raise RuntimeError("no room on the device")
        return place(features)

    monkeypatch.setattr(harness.runner, "features_on_device", placed)
    harness.restart()
    harness.ask("other", "Hello!", start=True)
    for images in ([], [picture("red")]):
        reference = TransformersChat(DEMO)
        harness.ask("s", QUESTIONS[0], images, start=True)
        reference.ask(QUESTIONS[0], images)
        is_broken.set()
        assert failure(harness.submit("s", "?", [picture("blue")])) is ErrorCode.INTERNAL
        is_broken.clear()
        text, _ = harness.ask("s", QUESTIONS[1], [picture("green")])
        assert text == reference.answer(QUESTIONS[1], [picture("green")])
    assert harness.ask("other", "Hello?")[0]


def test_an_ended_session_holds_nothing_when_its_client_hears_of_it(
    harness: EngineHarness,
) -> None:
    harness.ask("s", QUESTIONS[0], [picture("red")], start=True)
    session = harness.session("s")
    held: list[int] = []

    def listen(_: object) -> None:
        kv = session.key_values
        held.append(kv.computed + len(kv.blocks) + len(session.images))

    harness.submit("s", end=True, listen=listen).wait()
    assert held == [0]
    counts = harness.engine.statistics()
    assert counts.blocks_free == counts.blocks_total
    assert counts.images == 0


def test_closing_a_session_cancels_equal_turns_with_pictures(harness: EngineHarness) -> None:
    running = harness.submit("s", "Hello!", start=True, max_tokens=800, ignore_eos=True)
    next(running.deltas())
    waiting = [harness.submit("s", "Same?", [picture("red")]) for _ in range(3)]
    harness.engine.close("s")
    for turn in (running, *waiting):
        assert failure(turn) is ErrorCode.CANCELLED
    assert harness.engine.statistics().turns_in_flight == 0
    assert harness.engine.statistics().sessions_open == 0


def test_a_seed_decides_a_sampled_answer(harness: EngineHarness) -> None:
    def sampled(session: str, seed: int) -> str:
        return harness.ask(
            session, "Hello!", start=True, temperature=2.0, seed=seed, ignore_eos=True
        )[0]

    noise = harness.submit("n", "Hello!", start=True, max_tokens=600, ignore_eos=True)
    assert sampled("a", 1) == sampled("b", 1)
    assert len({sampled(f"c{seed}", seed) for seed in range(6)}) > 1
    harness.engine.cancel(noise.id)


def test_shutdown_tells_turns_in_flight() -> None:
    harness = EngineHarness(DEMO)
    turn = harness.submit("a", "Hello!", start=True, max_tokens=900, ignore_eos=True)
    next(turn.deltas())
    harness.shutdown()
    assert failure(turn) is ErrorCode.UNAVAILABLE
