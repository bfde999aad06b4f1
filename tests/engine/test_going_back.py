"""Sessions that go back: answers regenerated, turns taken back."""

from __future__ import annotations

import threading

import pytest

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.operations import Operation
from llava_triton.contract.structured_outputs import StructuredOutputs
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Alone, Ask, Start, failure

REGENERATE = Operation(regenerate=True)
FIRST = Ask("What is it?", (PICTURES[0],))
SECOND = Ask("And the other one?", (PICTURES[1],))
THIRD = Ask("Why so?")


def tell(harness: EngineHarness, *turns: Ask) -> list[tuple[str, Delta]]:
    """A conversation in the session "s"."""
    return [turn.wait(harness, "s", start=index == 0) for index, turn in enumerate(turns)]


def tokens(harness: EngineHarness) -> int:
    return len(harness.session("s").tokens)


def test_an_answer_is_regenerated_and_nothing_else_computed(start: Start, alone: Alone) -> None:
    harness = start()
    told = tell(harness, FIRST, SECOND)
    before = harness.history("s")
    text, final = harness.ask("s", operation=REGENERATE, max_tokens=20)
    assert (text, final.num_input_tokens) == (told[1][0], told[1][1].num_input_tokens)
    # The prompt's last token is computed for the logits that begin the answer.
    assert final.num_cached_tokens == final.num_input_tokens - 1
    assert harness.history("s") == before
    other, final = harness.ask(
        "s", operation=REGENERATE, temperature=2.0, seed=3, max_tokens=9, ignore_eos=True
    )
    assert other != text
    assert final.num_cached_tokens == final.num_input_tokens - 1
    harness.ask("s", operation=REGENERATE, max_tokens=20)
    assert THIRD.wait(harness, "s")[0] == alone(FIRST, SECOND, THIRD)[-1]


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_rewound_session_goes_on_as_if_nothing_had_followed(
    start: Start, alone: Alone, kept: int, at_once: bool
) -> None:
    harness = start()
    turns = [FIRST, SECOND, THIRD]
    told = tell(harness, *turns)
    again, rewind = Ask("Something else?", (PICTURES[2],)), Operation(rewind=kept)
    if at_once:
        text, final = again.wait(harness, "s", operation=rewind)
    else:
        nothing, rewound = harness.ask("s", operation=rewind)
        assert (nothing, rewound.finish_reason) == ("", "prefilled")
        assert rewound.num_input_tokens == tokens(harness)
        assert harness.engine.statistics().images == min(kept, 2)
        text, final = again.wait(harness, "s")
    assert text == alone(*turns[:kept], again)[-1]
    if kept:
        end = told[kept - 1][1]
        assert final.num_cached_tokens >= end.num_input_tokens + end.num_output_tokens - 1
    later = Ask("And?")
    assert later.wait(harness, "s")[0] == alone(*turns[:kept], again, later)[-1]
    assert harness.engine.statistics().images == min(kept, 2) + 1


def test_pictures_that_came_without_a_question_stay(start: Start, alone: Alone) -> None:
    harness = start()
    shown = Ask(None, (PICTURES[0],))
    tell(harness, shown, THIRD)
    more = Ask(None, (PICTURES[1], PICTURES[2]))
    more.wait(harness, "s")
    SECOND.wait(harness, "s")
    _, final = harness.ask("s", operation=Operation(rewind=1))
    assert final.num_cached_tokens == final.num_input_tokens == tokens(harness)
    assert harness.engine.statistics().images == 3
    assert SECOND.wait(harness, "s")[0] == alone(shown, THIRD, more, SECOND)[-1]
    harness.ask("s", operation=Operation(rewind=0))
    assert harness.engine.statistics().images == 1
    text, final = THIRD.wait(harness, "s")
    assert text == alone(shown, THIRD)[-1]
    assert final.num_cached_tokens > len(PICTURES)
    harness.ask("s", operation=REGENERATE, max_tokens=20)
    harness.ask("s", operation=Operation(rewind=0))
    assert harness.engine.statistics().images == 1


def test_a_history_has_turns_to_go_back_to(start: Start) -> None:
    history = [PastTurn("What is it?", "a red square", 1), PastTurn("And this?", "two", 1)]
    expected = start()
    expected.ask("s", None, PICTURES[:1], start=True, history=history[:1])
    second, _ = expected.ask("s", "And this?", PICTURES[1:2])
    expected.ask("s", operation=Operation(rewind=1))
    third, _ = THIRD.wait(expected, "s")
    harness = start()
    harness.ask("s", None, PICTURES[:2], start=True, history=history)
    assert harness.ask("s", operation=REGENERATE)[0] == second
    harness.ask("s", operation=Operation(rewind=1))
    assert harness.engine.statistics().images == 1
    assert THIRD.wait(harness, "s")[0] == third


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize(
    "operation", [REGENERATE, Operation(rewind=1), Operation(rewind=0)], ids=str
)
def test_a_cancelled_turn_brings_back_what_it_took_back(
    start: Start, alone: Alone, operation: Operation, evicted: bool
) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    before = harness.history("s")
    if evicted:
        harness.evict_idle()
        harness.poison_free_blocks()
    text = None if operation.regenerate else "New? " * 30
    images = () if operation.regenerate else PICTURES[2:4]
    running = harness.submit(
        "s", text, images, operation=operation, max_tokens=400, ignore_eos=True
    )
    next(running.deltas())
    harness.check_state()
    harness.engine.cancel(running.id)
    assert failure(running) is ErrorCode.CANCELLED
    assert harness.history("s") == before
    assert harness.engine.statistics().images == 2
    assert THIRD.wait(harness, "s")[0] == alone(FIRST, SECOND, THIRD)[-1]


@pytest.mark.parametrize("how", ["end", "close", "shutdown"])
def test_a_session_ends_while_a_turn_has_taken_some_of_it_back(start: Start, how: str) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    with harness.held_device() as device:
        running = harness.submit("s", "New?", operation=Operation(rewind=0), end=how == "end")
        device.wait_until_busy()
        assert harness.engine.statistics().images == 2
        if how == "close":
            harness.engine.close("s")
            assert failure(running) is ErrorCode.CANCELLED
        elif how == "shutdown":
            shutting_down = threading.Thread(target=harness.shutdown)  # waits for the device
            shutting_down.start()
            assert failure(running) is ErrorCode.UNAVAILABLE
    if how == "end":
        running.wait()
    elif how == "shutdown":
        shutting_down.join()
    harness.assert_nothing_is_held()


def test_a_turn_waits_for_the_one_before_it(start: Start, alone: Alone) -> None:
    harness = start()
    tell(harness, FIRST)
    with harness.held_device() as device:
        asked = SECOND.submit(harness, "s")
        device.wait_until_busy()
        rewound = harness.submit("s", operation=Operation(rewind=1))
        third = THIRD.submit(harness, "s")
        again = harness.submit("s", operation=REGENERATE, max_tokens=20)
    asked.wait()
    rewound.wait()
    assert third.wait()[0] == again.wait()[0] == alone(FIRST, THIRD)[-1]


@pytest.mark.parametrize(
    ("start_flag", "text", "operation", "sentence"),
    [
        (False, None, Operation(rewind=3), "to turn 3; it has 2 completed turns: give 0 to 2"),
        (False, "And?", REGENERATE, "a new message came with it"),
        (False, None, Operation(rewind=1, regenerate=True), "send them one by one"),
        (True, None, REGENERATE, "regenerate came with the sequence start flag"),
        (True, "And?", Operation(rewind=0), "rewind came with the sequence start flag"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(
    start: Start, alone: Alone, start_flag: bool, text: str, operation: Operation, sentence: str
) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    with pytest.raises(SessionError, match=sentence) as caught:
        harness.ask("s", text, start=start_flag, operation=operation)
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert THIRD.wait(harness, "s")[0] == alone(FIRST, SECOND, THIRD)[-1]


def test_there_is_nothing_to_regenerate_before_the_first_answer(start: Start) -> None:
    harness = start()
    Ask(None, (PICTURES[0],)).wait(harness, "s", start=True)
    with pytest.raises(SessionError, match="no answer to regenerate in the session; ask first"):
        harness.ask("s", operation=REGENERATE)
    assert harness.engine.statistics().images == 1


def test_what_a_regenerated_answer_shall_be_is_looked_at_as_any_other(
    start: Start, alone: Alone
) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    with pytest.raises(SessionError, match="stop_token_ids has the token ID 1000000"):
        harness.ask("s", operation=REGENERATE, stop_token_ids=(1_000_000,))
    form = StructuredOutputs(choice=("red", "blue"))
    said, _ = harness.ask("s", operation=REGENERATE, structured_outputs=form)
    assert said in form.choice
    harness.ask("s", operation=REGENERATE, max_tokens=20)
    assert THIRD.wait(harness, "s")[0] == alone(FIRST, SECOND, THIRD)[-1]
