"""Pictures of any number of tokens: where they are in a prompt, and that answers come out right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.conversation.prompt import CompletedTurn, Prompt, Span, expanded
from llava_triton.engine import TurnRequest
from llava_triton.engine.image_store import Image
from llava_triton.engine.session import Session, SessionId
from llava_triton.model.sampling import SamplingParameters
from tests.engine_harness import EngineHarness, Pending
from tests.reference import load_reference
from tests.small_engine import Start

PLACEHOLDER = 7
LENGTHS = (1, 37, 16, 3, 64)
"""Tokens of pictures: of one row, of more than two blocks, of exactly one."""


def test_a_placeholder_becomes_as_many_as_its_picture_has_tokens() -> None:
    prompt = expanded([1, PLACEHOLDER, 2, PLACEHOLDER, PLACEHOLDER], PLACEHOLDER, [2, 1, 3])
    assert prompt.ids == [1, *[PLACEHOLDER] * 2, 2, *[PLACEHOLDER] * 4]
    assert prompt.spans == [Span(1, 2), Span(4, 1), Span(5, 3)]
    behind = Prompt([3, 3])
    behind.append(prompt)
    assert behind.spans == [Span(3, 2), Span(6, 1), Span(7, 3)]
    with pytest.raises(ValueError, match="rendered 1 image placeholders for 2 images"):
        expanded([PLACEHOLDER], PLACEHOLDER, [2, 2])


def session_of(lengths: Sequence[int], text: int = 2) -> Session:
    """Pictures of so many tokens, with a little text before each and behind the last."""
    session = Session("s", 0.0, 0.0)
    session.images = [Image(bytes([number]), torch.zeros(n, 1)) for number, n in enumerate(lengths)]
    ids = [1]
    for _ in lengths:
        ids += [PLACEHOLDER, *[2] * text]
    session.append(expanded(ids, PLACEHOLDER, lengths))
    return session


@given(
    lengths=st.lists(st.integers(1, 20), max_size=6),
    text=st.integers(0, 3),
    start=st.integers(0, 80),
    count=st.integers(1, 40),
)
def test_the_pictures_in_a_stretch_of_tokens(
    lengths: list[int], text: int, start: int, count: int
) -> None:
    session = session_of(lengths, text)
    found = [(span.start, span.image) for span in session.pictures(start, start + count)]
    there = [
        (span.start, span.image)
        for span in session.spans
        if set(range(span.start, span.end)) & set(range(start, start + count))
    ]
    assert found == there


def test_a_session_cut_back_keeps_whole_pictures_only() -> None:
    session = session_of([5, 5])
    second = session.spans[1]
    session.truncate(second.end)
    assert [span.image for span in session.spans] == session.images
    session.truncate(second.start + 3)
    assert (len(session.tokens), len(session.spans)) == (second.start, 1)
    session.truncate(0)
    assert (session.tokens, session.spans) == ([], [])


def test_what_stays_of_a_message_that_is_replaced() -> None:
    session = session_of([4])
    session.turns = [CompletedTurn(asked=1, end=1, images=0, pending=0, answer="", number=0)]
    again = Prompt(session.tokens[1:], [Span(0, 4)])
    longer = Prompt([*again.ids, 9], again.spans)
    assert session.replace_message(longer) == len(session.tokens) - 1
    assert session.replace_message(Prompt([8, 8])) == 1
    assert (session.tokens, session.spans) == ([1, 8, 8], [])


# Whole conversations.


class Chat:
    """A conversation by `generate` on the embeddings of the whole of it, float32."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, session: Session, tokens: int) -> list[int]:
        """What follows all tokens of a session but the last answer's, which `committed` ends."""
        placeholder = self._model.config.image_token_id
        ids = torch.tensor(session.tokens[: session.committed - tokens])
        embeddings = self._model.get_input_embeddings()(ids.where(ids != placeholder, 0))
        rows = [image.features for image in session.images]
        if rows:
            embeddings[ids == placeholder] = torch.cat(rows)
        with torch.inference_mode():
            said = self._model.generate(
                inputs_embeds=embeddings[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                suppress_tokens=[placeholder],
            )
        return [int(token) for token in said[0]]


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> Chat:
    return Chat(load_reference(checkpoint))


def pictures(width: int, lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, ...]:
    """Features as lively as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, width, generator=generator) for length in lengths)


def ask(
    harness: EngineHarness,
    session_id: SessionId,
    text: str | None,
    features: tuple[Tensor, ...] = (),
    *,
    start: bool = False,
) -> Pending:
    pending = Pending()
    sampling = SamplingParameters(max_tokens=12, ignore_eos=True)
    request = TurnRequest(
        session_id, text=text, image_features=features, start=start, sampling=sampling
    )
    pending.id = harness.engine.submit(request, pending.events.put)
    return pending


@pytest.mark.parametrize("limits", [{}, {"prefill_chunk_tokens": 16}], ids=["whole", "in chunks"])
def test_pictures_of_different_lengths_in_one_turn(
    start: Start, chat: Chat, limits: dict[str, int]
) -> None:
    harness = start(**limits)
    shown = pictures(harness.runner.hidden_size, LENGTHS)
    turns = [("What is it?", shown[:3]), ("And?", ()), (None, shown[3:4]), ("?", shown[4:])]
    for index, (text, features) in enumerate(turns):
        final = ask(harness, "s", text, features, start=index == 0).wait()[1]
        session = harness.session("s")
        if text is not None:
            assert session.tokens[-12:] == chat.answer(session, 12)
            assert final.num_output_tokens == 12
        harness.check_state()
    assert [span.length for span in harness.session("s").spans] == list(LENGTHS)


def test_a_longer_picture_is_another_one(start: Start, chat: Chat) -> None:
    """Equal tokens and equal first rows; the blocks before the difference are shared, no other."""
    harness = start()
    (long,) = pictures(harness.runner.hidden_size, [64])
    for name, rows in (("long", 64), ("short", 48), ("again", 64)):
        features = (long[:rows].clone(),)
        final = ask(harness, name, "What is it?", features, start=True).wait()[1]
        assert (final.num_cached_tokens > 60) == (name == "again")
        session = harness.session(name)
        assert session.tokens[-12:] == chat.answer(session, 12)
    harness.check_state()


def test_two_pictures_whose_rows_are_cut_elsewhere_are_others(start: Start, chat: Chat) -> None:
    harness = start()
    (rows,) = pictures(harness.runner.hidden_size, [64])
    for name, cut in (("one", 20), ("other", 44)):
        features = (rows[:cut].clone(), rows[cut:].clone())
        ask(harness, name, "What is it?", features, start=True).wait()
        session = harness.session(name)
        assert session.tokens[-12:] == chat.answer(session, 12)
    harness.check_state()


@pytest.mark.parametrize("shape", [(0, 64), (3, 63), (64,), (1, 2, 64)])
def test_features_of_another_width_are_refused(start: Start, shape: tuple[int, ...]) -> None:
    harness = start()
    with pytest.raises(SessionError, match=r"this model takes \[T, 64\]") as caught:
        ask(harness, "s", "?", (torch.zeros(shape),), start=True).wait()
    assert caught.value.code is ErrorCode.INVALID_ARG


def test_a_picture_longer_than_the_context_is_refused(start: Start) -> None:
    harness = start()
    longest = harness.runner.context_length
    with pytest.raises(SessionError, match="would be at least") as caught:
        ask(harness, "s", "?", (torch.zeros(longest + 1, 64),), start=True).wait()
    assert caught.value.code is ErrorCode.INVALID_ARG
    harness.assert_nothing_is_held()
