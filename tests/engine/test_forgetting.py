"""Conversations that fill the context: their oldest turns are forgotten, where a client says so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.operations import Operation
from llava_triton.conversation.forgetting import ANSWER_SHARE
from llava_triton.kernels.base import BLOCK_TOKENS
from tests.engine_harness import EngineHarness
from tests.reference import TransformersChat
from tests.small_engine import PICTURES, Start, failure

BLOCKS = 16
CONTEXT = BLOCKS * BLOCK_TOKENS
AUTO: dict[str, Any] = {"truncation": "auto", "max_tokens": 12, "ignore_eos": True}
REGENERATE = Operation(regenerate=True)


def question(number: int) -> str:
    return f"Question number {number}?"


def ask(harness: EngineHarness, number: int, **more: Any) -> tuple[str, Delta]:
    """Question 0 opens the session and shows a picture."""
    if number == 0:
        more.setdefault("images", PICTURES[:1])
    return harness.ask("s", question(number), start=number == 0, **{**AUTO, **more})


def fill(harness: EngineHarness, **more: Any) -> int:
    """Ask until the next question makes the session forget; its number."""
    ends = opening = 0
    for number in range(40):
        _, final = ask(harness, number, **more)
        assert final.num_forgotten_turns == 0
        before, ends = ends, final.num_input_tokens + final.num_output_tokens
        opening = opening or ends
        asked = final.num_input_tokens - before
        if number and ends + asked + (CONTEXT - opening) // ANSWER_SHARE > CONTEXT:
            return number + 1
    raise AssertionError("the context is never full")


class Shortened(TransformersChat):
    """The reference, on what is left of the conversation."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self._ends: list[int] = []
        self._shows: list[bool] = []
        self.forgotten = 0

    def forget(self, turns: int) -> None:
        """So many turns in all, the oldest first; the first one and those with pictures stay."""
        while self.forgotten < turns:
            index = next(i for i in range(1, len(self._ends)) if not self._shows[i])
            start, end = self._ends[index - 1], self._ends[index]
            del self._ids[start:end], self._ends[index], self._shows[index]
            self._ends[index:] = [each - (end - start) for each in self._ends[index:]]
            self.forgotten += 1

    def turn(self, text: str, images: Any, max_tokens: int) -> list[int]:
        answer = self.ask(text, images, max_tokens, eos_token_id=-1)
        self._ends.append(len(self._ids))
        self._shows.append(bool(images))
        return answer


def test_answers_are_those_of_transformers_on_the_shortened_conversation(
    start: Start, checkpoint: Path
) -> None:
    harness, reference = start(blocks=BLOCKS), Shortened(checkpoint)
    shows = {0: PICTURES[:1], 3: PICTURES[1:2], 9: PICTURES[2:4]}
    before, ends, forgot = 0, 0, 0
    for number in range(26):
        images = shows.get(number, [])
        _, final = ask(harness, number, images=images)
        reference.forget(final.num_forgotten_turns)
        expected = reference.turn(question(number), images, AUTO["max_tokens"])
        assert harness.history("s")[-len(expected) :] == expected
        assert harness.history("s") == reference.ids
        assert final.num_input_tokens + final.num_output_tokens <= CONTEXT
        if final.num_forgotten_turns > before:
            forgot += 1
            assert final.num_cached_tokens < ends - 1
        else:  # all but the new question
            assert final.num_cached_tokens >= ends - 1
        before = final.num_forgotten_turns
        ends = final.num_input_tokens + final.num_output_tokens
    assert before > 2 * forgot > 2, "several at once, and not at every turn"
    assert harness.engine.statistics().images == 4


def test_what_is_before_the_forgotten_turns_is_not_computed_again(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    first = ask(harness, 0)[1]
    full = fill(harness)
    _, final = ask(harness, full)
    assert final.num_forgotten_turns >= 2
    opening = first.num_input_tokens + first.num_output_tokens
    assert final.num_cached_tokens == opening - opening % BLOCK_TOKENS or (
        final.num_cached_tokens == opening
    )
    assert final.num_input_tokens < CONTEXT * 3 // 4
    now = harness.engine.statistics()
    assert now.images == 1


def test_without_it_the_turn_is_refused_and_the_session_stays(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    full = fill(harness, truncation=None)
    before = harness.history("s")
    for said in (None, "disabled"):
        with pytest.raises(SessionError, match="oldest turns be forgotten") as caught:
            harness.ask("s", "o " * 120, **{**AUTO, "truncation": said})
        assert caught.value.code is ErrorCode.INVALID_ARG
        assert harness.history("s") == before
    assert ask(harness, full)[1].num_forgotten_turns > 0


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("operation", [Operation(), REGENERATE, Operation(rewind=4)], ids=str)
def test_a_cancelled_turn_brings_back_what_it_forgot(
    start: Start, operation: Operation, evicted: bool
) -> None:
    harness, untouched = start(blocks=BLOCKS), start(blocks=BLOCKS)
    full = fill(harness)
    fill(untouched)
    before, turns = harness.history("s"), list(harness.session("s").turns)
    if evicted:
        harness.evict_idle()
        harness.poison_free_blocks()
    again = operation == REGENERATE
    running = harness.submit(
        "s",
        None if again else "New? " * 25,
        () if again else PICTURES[2:4],
        operation=operation,
        truncation="auto",
        ignore_eos=True,
        max_tokens=100,
    )
    first = next(running.deltas())
    assert first.num_forgotten_turns > 0 or operation != Operation()
    harness.check_state()
    harness.engine.cancel(running.id)
    assert failure(running) is ErrorCode.CANCELLED
    assert harness.history("s") == before
    assert harness.session("s").turns == turns
    assert harness.engine.statistics().images == 1
    for number in (full, full + 1):
        text, final = ask(harness, number)
        other, expected = ask(untouched, number)
        assert text == other
        assert final.num_input_tokens == expected.num_input_tokens
        assert final.num_forgotten_turns == expected.num_forgotten_turns > 0


def test_a_session_that_forgot_goes_back_by_the_numbers_of_its_turns(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    full = fill(harness)
    text, final = ask(harness, full)
    forgotten = final.num_forgotten_turns
    again, same = harness.ask("s", operation=REGENERATE, **AUTO)
    assert (again, same.num_input_tokens) == (text, final.num_input_tokens)
    assert same.num_cached_tokens == same.num_input_tokens - 1
    assert same.num_forgotten_turns == forgotten
    other, opened = harness.ask("fork", start=True, operation=Operation(fork="s", rewind=full))
    assert opened.num_forgotten_turns == forgotten
    assert harness.ask("fork", question(full), **AUTO)[0] == text
    # The question before is there, so its number leads to where it was answered.
    _, rewound = harness.ask("s", operation=Operation(rewind=full))
    assert rewound.num_forgotten_turns == forgotten
    assert ask(harness, full)[0] == text
    # Of the first two, the second is forgotten and does not come back.
    _, rewound = harness.ask("s", operation=Operation(rewind=2))
    assert rewound.num_forgotten_turns == 1
    assert len(harness.session("s").turns) == 1
    _, third = ask(harness, 2)
    assert third.num_forgotten_turns == 1
    assert harness.session("s").turns[-1].number == 2
    with pytest.raises(SessionError, match="it has 3 completed turns"):
        harness.ask("s", operation=Operation(rewind=4))
    assert other == ""


def test_pictures_shown_behind_a_forgotten_question_go_with_what_followed_it(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    ask(harness, 0)
    ask(harness, 1)
    ask(harness, 2)
    harness.ask("s", None, PICTURES[1:2], **AUTO)
    number = 3
    while True:
        _, final = ask(harness, number)
        number += 1
        if final.num_forgotten_turns:
            break
    assert [turn.number for turn in harness.session("s").turns][:2] == [0, 3]
    harness.ask("s", operation=Operation(rewind=2))
    assert harness.engine.statistics().images == 1
    assert harness.session("s").answered == 2
    harness.ask("s", operation=Operation(rewind=1))
    assert harness.session("s").forgotten == 0


def test_a_history_is_shortened_alike_each_time_it_is_told(start: Start) -> None:
    harness, shorter = start(blocks=BLOCKS), start(blocks=BLOCKS)
    history = [PastTurn(question(0), "a red circle", 1)]
    found, forgotten = [], {0}
    for number in range(1, 40):
        images = PICTURES[:1]
        if number == 6:
            history[3] = PastTurn(question(3), "a blue one", 1)
        if number >= 6:
            images = PICTURES[:2]
        text, final = harness.ask(
            "s", question(number), images, start=True, end=True, history=history, **AUTO
        )
        gone = final.num_forgotten_turns
        old = [index for index in range(1, number) if not history[index].images][:gone]
        left = [turn for index, turn in enumerate(history) if index not in old]
        expected, same = shorter.ask(
            "s",
            question(number),
            images,
            start=True,
            end=True,
            history=left,
            max_tokens=12,
            ignore_eos=True,
        )
        assert (text, final.num_input_tokens) == (expected, same.num_input_tokens)
        if gone in forgotten and number != 6:
            found.append(final.num_cached_tokens / final.num_input_tokens)
        forgotten.add(gone)
        history.append(PastTurn(question(number), "It is a small green square there."))
    assert 3 <= len(forgotten) < 15, "several at once"
    assert min(found[1:]) > 0.5, "what the last request computed is found"


def test_what_the_opening_says_holds_for_the_session(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    quiet = {"max_tokens": 12, "ignore_eos": True}
    harness.ask("s", None, PICTURES[:1], start=True, truncation="auto")
    final = Delta("", "", 0, 0, 0, 0.0)
    for number in range(20):
        _, final = harness.ask("s", question(number), **quiet)
    assert final.num_forgotten_turns > 0
    harness.ask("fork", start=True, operation=Operation(fork="s"))
    for _ in range(10):
        harness.ask("fork", "And?", **quiet)
    with pytest.raises(SessionError, match="the model's context is"):
        harness.ask("s", "o " * 180, truncation="disabled", **quiet)
    harness.ask("s", "o " * 180, **quiet)


def test_what_cannot_be_forgotten_ends_the_conversation(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    ask(harness, 0)
    with pytest.raises(SessionError, match="open a new session"):
        harness.ask("s", "o " * 300, **AUTO)
    for picture in PICTURES[1:4]:
        harness.ask("s", "And this?", [picture], **AUTO)
    with pytest.raises(SessionError, match="show fewer or smaller images"):
        harness.ask("s", "And these?", PICTURES[:6], **AUTO)
    _, final = harness.ask("s", "Why?", **{**AUTO, "max_tokens": 1})
    assert final.num_forgotten_turns == 0


def test_a_picture_without_a_question_leaves_an_answer_to_regenerate(start: Start) -> None:
    harness = start(blocks=BLOCKS)
    full = fill(harness)
    ask(harness, full)
    while True:
        _, shown = harness.ask("s", None, PICTURES[:3], **AUTO)
        if shown.num_forgotten_turns:
            break
    assert harness.session("s").turns[-1].number == full
    harness.check_state()
    harness.ask("s", operation=REGENERATE, **AUTO)
    assert harness.session("s").turns[-1].number == full


def test_a_session_that_forgot_comes_back_from_the_journal(start: Start, tmp_path: Path) -> None:
    harness = start(blocks=BLOCKS, journal=(tmp_path / "journal").as_uri())
    untouched = start(blocks=BLOCKS)
    full = fill(harness)
    fill(untouched)
    _, final = ask(harness, full)
    ask(untouched, full)
    assert final.num_forgotten_turns > 0
    before, turns = harness.history("s"), list(harness.session("s").turns)
    log = harness.session("s").log
    assert log is not None
    until = time.monotonic() + 60
    while not log.is_safe:
        assert time.monotonic() < until
        time.sleep(0.01)
    harness.restart()
    _, back = harness.ask("s", start=True, operation=Operation(resume=True))
    assert back.num_forgotten_turns == final.num_forgotten_turns
    assert (harness.history("s"), harness.session("s").turns) == (before, turns)
    for number in range(full + 1, full + 8):  # it goes on forgetting, because it began so
        text, told = ask(harness, number, truncation=None)
        expected, same = ask(untouched, number)
        assert (text, told.num_forgotten_turns) == (expected, same.num_forgotten_turns)
    harness.ask("s", end=True)
