"""Which turns of a conversation are forgotten."""

from __future__ import annotations

from hypothesis import strategies as st

from llava_triton.conversation.forgetting import (
    ANSWER_SHARE,
    KEPT_SHARE,
    NewMessage,
    as_it_went,
    turns_to_forget,
    without,
)
from llava_triton.conversation.prompt import CompletedTurn, Prompt, Span
from llava_triton.conversation.renderer import Past
from tests.properties import given

CONTEXT = 200
TURNS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), st.booleans()), max_size=30)


def past_of(turns: list[tuple[int, int, bool]]) -> Past:
    """Turns of so many tokens of question and answer; of some the question has a picture."""
    prompt, completed, images = Prompt(), [], 0
    for number, (question, answer, shows) in enumerate(turns):
        start = len(prompt)
        spans = [Span(0, 1)] if shows else []
        images += shows
        prompt.append(Prompt([number] * (question + answer), spans))
        completed.append(
            CompletedTurn(start + question, len(prompt), images, 0, str(number), number)
        )
    return Past(prompt, tuple(completed))


def numbers(past: Past) -> list[int]:
    return [turn.number for turn in past.turns]


@given(TURNS, st.integers(0, 250), st.booleans())
def test_what_stays(turns: list[tuple[int, int, bool]], message: int, asks: bool) -> None:
    past = past_of(turns)
    forgotten = turns_to_forget(past.turns, NewMessage(message, asks), CONTEXT)
    left = without(past, forgotten)
    assert forgotten == sorted(set(range(len(turns))) - set(numbers(left)))
    assert left.forgotten == len(forgotten)
    # Each turn that is left is whole, with its pictures.
    expected = past_of([turns[number] for number in numbers(left)])
    assert [(turn.asked, turn.end, turn.images) for turn in left.turns] == [
        (turn.asked, turn.end, turn.images) for turn in expected.turns
    ]
    assert left.prompt.spans == expected.prompt.spans
    assert left.prompt.ids == [
        number for number in numbers(left) for _ in range(sum(turns[number][:2]))
    ]
    kept = {0, *(number for number, turn in enumerate(turns) if turn[2])}
    assert not kept & set(forgotten)
    asked_again = set() if asks or not turns else {len(turns) - 1}
    assert not asked_again & set(forgotten)
    stays = sorted((kept & set(range(len(turns)))) | asked_again)
    room = CONTEXT - sum(sum(turns[number][:2]) for number in stays)
    others = [number for number in range(len(turns)) if number not in stays]
    # The oldest, and no more than has to be.
    assert forgotten == others[: len(forgotten)]
    size = len(past.prompt) + message - (CONTEXT - room)
    if size + (max(0, room) // ANSWER_SHARE if asks else 0) <= max(0, room):
        assert not forgotten
    elif len(forgotten) < len(others):
        size = len(left.prompt) + message - (CONTEXT - room)
        last = sum(turns[forgotten[-1]][:2])
        assert size * KEPT_SHARE <= room < (size + last) * KEPT_SHARE


@given(TURNS, st.integers(1, 40))
def test_a_conversation_that_is_told_again_forgets_what_it_forgot(
    turns: list[tuple[int, int, bool]], message: int
) -> None:
    session = Past()
    for number, (question, answer, shows) in enumerate(turns):
        told = as_it_went(past_of(turns[:number]), NewMessage(question, asks=True), CONTEXT)
        forgotten = turns_to_forget(session.turns, NewMessage(question, asks=True), CONTEXT)
        session = without(session, forgotten)
        assert numbers(session) == numbers(told)
        assert session.prompt == told.prompt
        assert session.forgotten == told.forgotten
        # What is answered joins it.
        whole = past_of([*(turns[each] for each in numbers(session)), (question, answer, shows)])
        ends = [
            CompletedTurn(turn.asked, turn.end, turn.images, 0, str(each), each)
            for turn, each in zip(whole.turns, [*numbers(session), number], strict=True)
        ]
        ids = [turn.number for turn in ends for _ in range(sum(turns[turn.number][:2]))]
        session = Past(Prompt(ids, whole.prompt.spans), tuple(ends), session.forgotten)
