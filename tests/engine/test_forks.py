"""Sessions that begin as copies of others."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.operations import Operation
from llava_triton.contract.structured_outputs import StructuredOutputs
from llava_triton.conversation.grammar import Grammar, Grammars
from llava_triton.engine.session import SessionId
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Alone, Ask, Start, failure, on_host, resident

FIRST = Ask("What is it?", (PICTURES[0],))
SECOND = Ask("And the other one?", (PICTURES[1],))
ONE_WAY, OTHER_WAY = Ask("Why so? " * 5), Ask("Not so? " * 3, (PICTURES[2],))


def fork(
    harness: EngineHarness, session_id: SessionId, source: SessionId, turns: int | None = None
) -> int:
    """Tokens that were computed for it."""
    operation = Operation(fork=source, rewind=turns)
    text, final = harness.ask(session_id, start=True, operation=operation)
    assert (text, final.finish_reason) == ("", "prefilled")
    assert final.num_input_tokens == len(harness.session(session_id).tokens)
    return final.num_input_tokens - final.num_cached_tokens


def tell(harness: EngineHarness, *turns: Ask) -> None:
    for index, turn in enumerate(turns):
        turn.wait(harness, "s", start=index == 0)


def test_a_fork_has_all_and_computes_nothing_of_it(start: Start, alone: Alone) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    before = harness.engine.statistics()
    # The last token of an answer is computed with what follows.
    assert fork(harness, "fork", "s") == 1
    now = harness.engine.statistics()
    assert now.blocks_free == before.blocks_free
    assert now.prompt_tokens_computed == before.prompt_tokens_computed
    assert now.images == 2
    expected = alone(FIRST, SECOND, ONE_WAY)[-1]
    text, final = ONE_WAY.wait(harness, "s")
    assert text == expected
    other, forked = OTHER_WAY.wait(harness, "fork")
    assert other == alone(FIRST, SECOND, OTHER_WAY)[-1]
    assert forked.num_cached_tokens == final.num_cached_tokens
    copied = harness.engine.statistics().blocks_copied
    assert copied == before.blocks_copied + 1  # the one that both would have written to
    assert ONE_WAY.wait(harness, "fork")[0] == alone(FIRST, SECOND, OTHER_WAY, ONE_WAY)[-1]
    assert OTHER_WAY.wait(harness, "s")[0] == alone(FIRST, SECOND, ONE_WAY, OTHER_WAY)[-1]


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_fork_of_an_earlier_turn(start: Start, alone: Alone, turns: int) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    assert fork(harness, "fork", "s", turns) <= 1
    assert harness.engine.statistics().images == 2
    assert ONE_WAY.wait(harness, "fork")[0] == alone(*(FIRST, SECOND)[:turns], ONE_WAY)[-1]
    assert ONE_WAY.wait(harness, "s")[0] == alone(FIRST, SECOND, ONE_WAY)[-1]


@pytest.mark.parametrize("ended", ["s", "fork"])
def test_the_end_of_one_leaves_the_other_whole(start: Start, alone: Alone, ended: str) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    fork(harness, "fork", "s")
    harness.ask(ended, end=True)
    harness.poison_free_blocks()
    other = "fork" if ended == "s" else "s"
    assert ONE_WAY.wait(harness, other)[0] == alone(FIRST, SECOND, ONE_WAY)[-1]
    harness.ask(other, end=True)
    harness.assert_nothing_is_held()


@pytest.mark.parametrize("evicted", [["s"], ["fork"], ["s", "fork"], ["before"]], ids=str)
@pytest.mark.parametrize("host_blocks", [None, 12, 0])
def test_memory_pressure_takes_each_by_itself(
    start: Start, alone: Alone, evicted: list[str], host_blocks: int | None
) -> None:
    harness = start(host_blocks=host_blocks)
    tell(harness, FIRST, SECOND)
    if evicted == ["before"]:
        harness.evict_idle("s")
    fork(harness, "fork", "s")
    harness.check_state()
    if evicted != ["before"]:
        harness.evict_idle(*evicted)
        assert resident(harness) == {"s", "fork"} - set(evicted)
    if host_blocks is None:
        assert on_host(harness) == ({"s", "fork"} if evicted == ["before"] else set(evicted))
    harness.poison_free_blocks()
    assert OTHER_WAY.wait(harness, "fork")[0] == alone(FIRST, SECOND, OTHER_WAY)[-1]
    harness.poison_free_blocks()
    assert ONE_WAY.wait(harness, "s")[0] == alone(FIRST, SECOND, ONE_WAY)[-1]


@pytest.mark.parametrize("regenerates", [False, True])
def test_a_fork_does_not_have_the_answer_under_way(
    start: Start, alone: Alone, regenerates: bool
) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    if regenerates:
        again = Operation(regenerate=True)
        running = harness.submit("s", operation=again, max_tokens=400, ignore_eos=True)
    else:
        running = Ask("Go on!", (PICTURES[3],), 400, ignore_eos=True).submit(harness, "s")
    pieces = running.deltas()
    next(pieces)
    fork(harness, "fork", "s")
    expected = (FIRST,) if regenerates else (FIRST, SECOND)
    assert ONE_WAY.wait(harness, "fork")[0] == alone(*expected, ONE_WAY)[-1]
    said = len([*pieces])
    assert said
    harness.engine.close("s")
    assert OTHER_WAY.wait(harness, "fork")[0] == alone(*expected, ONE_WAY, OTHER_WAY)[-1]


def test_pictures_that_wait_for_a_question_are_the_forks_too(start: Start, alone: Alone) -> None:
    harness = start()
    shown = Ask(None, (PICTURES[0], PICTURES[1]))
    tell(harness, shown)
    assert fork(harness, "fork", "s") == 0
    harness.ask("s", end=True)
    assert harness.engine.statistics().images == 2
    assert ONE_WAY.wait(harness, "fork")[0] == alone(shown, ONE_WAY)[-1]


def test_a_fork_in_the_place_of_its_source(start: Start, alone: Alone) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    fork(harness, "s", "s", 1)
    assert ONE_WAY.wait(harness, "s")[0] == alone(FIRST, ONE_WAY)[-1]
    harness.ask("s", end=True)
    harness.assert_nothing_is_held()


def test_a_full_server_takes_no_fork(start: Start) -> None:
    harness = start(max_sessions=1)
    tell(harness, FIRST)
    refused = harness.submit("fork", start=True, operation=Operation(fork="s"))
    assert failure(refused) is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("flags", "operation", "code", "sentence"),
    [
        ({"start": True}, Operation(fork="x"), ErrorCode.NOT_FOUND, "session 'x' is unknown"),
        ({"start": True, "tenant": "bob"}, Operation(fork="s"), ErrorCode.NOT_FOUND, "'s' is unk"),
        ({"start": True}, Operation(fork="s", rewind=3), ErrorCode.INVALID_ARG, "to turn 3; it"),
        ({"start": True, "text": "?"}, Operation(fork="s"), ErrorCode.INVALID_ARG, "more came"),
        ({}, Operation(fork="s"), ErrorCode.INVALID_ARG, "send it with the sequence start flag"),
    ],
)
def test_what_cannot_be_forked_is_refused_and_nothing_changes(
    start: Start,
    alone: Alone,
    flags: dict[str, object],
    operation: Operation,
    code: ErrorCode,
    sentence: str,
) -> None:
    harness = start()
    tell(harness, FIRST, SECOND)
    name = "fork" if flags else "s"
    with pytest.raises(SessionError, match=sentence) as caught:
        harness.ask(name, operation=operation, **flags)
    assert caught.value.code is code
    assert harness.engine.statistics().sessions_open == 1
    assert ONE_WAY.wait(harness, "s")[0] == alone(FIRST, SECOND, ONE_WAY)[-1]


@pytest.mark.parametrize("meanwhile", ["a question", "a picture"])
def test_a_fork_copies_its_source_as_it_is_then_whatever_form_is_asked_of_it(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """A form is of an answer, and a fork has none: it does not wait for the compiler, while its
    source would go on."""
    may_go_on = threading.Event()
    compile_now = Grammars.compile

    def slow(grammars: Grammars, form: StructuredOutputs) -> Grammar:
        assert may_go_on.wait(60)
        return compile_now(grammars, form)

    monkeypatch.setattr(Grammars, "compile", slow)
    harness = start()
    shown = Ask(None, (PICTURES[0],))
    shown.wait(harness, "s", start=True)
    form = StructuredOutputs(choice=("yes",))
    other = harness.submit("other", "?", start=True, structured_outputs=form)
    fork = harness.submit(
        "fork", start=True, operation=Operation(fork="s"), structured_outputs=form
    )
    later = SECOND if meanwhile == "a question" else Ask(None, (PICTURES[1],))
    later.wait(harness, "s")
    may_go_on.set()
    assert fork.wait()[1].finish_reason == "prefilled"
    assert other.wait()[0] == "yes"
    assert OTHER_WAY.wait(harness, "fork")[0] == alone(shown, OTHER_WAY)[-1]


AGAIN = Operation(fork="s", regenerate=True)


@pytest.mark.parametrize("under_way", [True, False])
def test_another_answer_to_a_question_computes_nothing_of_it(
    start: Start, alone: Alone, under_way: bool
) -> None:
    harness = start()
    harness.ask("s", None, PICTURES[2:3], start=True)
    FIRST.wait(harness, "s")
    asked = harness.submit("s", "And now?", PICTURES[1:2], max_tokens=60, ignore_eos=True)
    if under_way:
        while not next(asked.deltas()).num_output_tokens:
            pass
    else:
        asked.wait()
    before = harness.engine.statistics()
    sampled: dict[str, Any] = {"temperature": 2.0, "max_tokens": 9, "ignore_eos": True}
    others = [
        harness.submit(f"other {seed}", start=True, end=True, operation=AGAIN, seed=seed, **sampled)
        for seed in range(3)
    ]
    same = harness.submit("same", start=True, operation=AGAIN, max_tokens=20)
    answers = [other.wait() for other in others]
    assert len({text for text, _ in answers}) == 3
    assert all(final.num_cached_tokens == final.num_input_tokens - 1 for _, final in answers)
    text, final = same.wait()
    assert final.num_cached_tokens == final.num_input_tokens - 1
    harness.check_state()
    shown, question = Ask(None, (PICTURES[2],)), Ask("And now?", (PICTURES[1],))
    assert text == alone(shown, FIRST, question)[-1]
    # It is a session like any other.
    assert ONE_WAY.wait(harness, "same")[0] == alone(shown, FIRST, question, ONE_WAY)[-1]
    if under_way:
        list(asked.deltas())
    now = harness.engine.statistics()
    assert now.images == before.images == 3
    again = harness.ask("same", operation=Operation(rewind=1))[1]
    assert again.num_cached_tokens == again.num_input_tokens
    for name in ("same", "s"):
        harness.ask(name, end=True)
    harness.assert_nothing_is_held()


def test_another_answer_outlives_the_turn_that_it_is_of(start: Start, alone: Alone) -> None:
    harness = start()
    asked = harness.submit("s", "What?", PICTURES[:1], start=True, max_tokens=400, ignore_eos=True)
    while not next(asked.deltas()).num_output_tokens:
        pass
    other = harness.submit("other", start=True, operation=AGAIN, max_tokens=20)
    harness.engine.cancel(asked.id)
    assert failure(asked) is ErrorCode.CANCELLED
    question = Ask("What?", (PICTURES[0],))
    assert other.wait()[0] == alone(question)[-1]
    assert ONE_WAY.wait(harness, "other")[0] == alone(question, ONE_WAY)[-1]


def test_there_is_no_other_answer_where_nothing_was_asked(start: Start) -> None:
    harness = start()
    harness.ask("s", None, PICTURES[:1], start=True)
    with pytest.raises(SessionError, match="no answer to regenerate"):
        harness.ask("other", start=True, operation=AGAIN)
    assert harness.engine.statistics().sessions_open == 1


def test_another_answer_of_a_form_is_to_the_question_that_is_the_last_then(
    start: Start, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    compile_now = Grammars.compile

    def slow(grammars: Grammars, form: StructuredOutputs) -> Grammar:
        assert may_go_on.wait(60)
        return compile_now(grammars, form)

    monkeypatch.setattr(Grammars, "compile", slow)
    harness = start()
    tell(harness, FIRST)
    form = StructuredOutputs(choice=("yes",))
    other = harness.submit("other", start=True, operation=AGAIN, structured_outputs=form)
    SECOND.wait(harness, "s")
    may_go_on.set()
    text, final = other.wait()
    assert text == "yes"
    assert final.num_cached_tokens == final.num_input_tokens - 1
    harness.check_state()
    history = harness.history("other")
    source = harness.history("s")
    assert history[: final.num_input_tokens] == source[: final.num_input_tokens]
    assert len(harness.session("other").turns) == 2
