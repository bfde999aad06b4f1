"""Streaming text, against a slow reference that decodes everything each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st

from llava_triton.conversation.detokenizer import MAX_UNREADABLE_TOKENS, REPLACEMENT, Detokenizer
from tests.properties import given
from tests.tokenizers_for_tests import byte_level, of_demo_checkpoint, sentence_piece

TOKENIZERS = {
    "byte level": byte_level,
    "SentencePiece": sentence_piece,
    "demo checkpoint": of_demo_checkpoint,
}
BYTE_LEVEL = ["byte level", "demo checkpoint"]
SENTENCES = st.text(
    st.sampled_from("ab .the\n  rdé東😀") | st.characters(exclude_categories=["Cs"]), max_size=30
)
STOPS = st.lists(st.text(st.sampled_from("ab the.é"), min_size=1, max_size=4), max_size=3)


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pieces_of(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tuple(stop))
    pieces = [detokenizer.push(token) for token in ids]
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.flush() == ""
    return pieces


def whole_text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).removeprefix(" ")


def slow_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """Decode everything after every token; end before the stop strings found then, if any."""
    for length in range(1, len(ids) + 1):
        text = whole_text(tokenizer, ids[:length])
        if length < len(ids):
            text = text.rstrip(REPLACEMENT)
        found = [text.find(string) for string in stop if string in text]
        if found:
            return text[: min(found)]
    return whole_text(tokenizer, ids)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(text=SENTENCES, stop=STOPS)
def test_pieces_make_the_text_before_the_first_stop_string(
    name: str, text: str, stop: list[str]
) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = ids_of(tokenizer, text)
    assert "".join(pieces_of(tokenizer, ids, stop)) == slow_text(tokenizer, ids, stop)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(text=SENTENCES, cut=st.integers(0, 100))
@example(text="<s>0", cut=3)  # special tokens are text to a tokenizer, and no text to a reader
def test_an_answer_cut_anywhere_is_decoded_as_a_whole(name: str, text: str, cut: int) -> None:
    tokenizer = TOKENIZERS[name]()
    all_ids = ids_of(tokenizer, text)
    ids = all_ids[:cut]
    answer = "".join(pieces_of(tokenizer, ids))
    if name in BYTE_LEVEL or REPLACEMENT in text:
        assert answer == whole_text(tokenizer, ids)
    else:
        # SentencePiece decodes an incomplete character, and all that came as bytes just before
        # it, to replacement characters; what has been shown of it stays as it was.
        assert whole_text(tokenizer, all_ids).startswith(answer.rstrip(REPLACEMENT))
        assert answer.startswith(whole_text(tokenizer, ids).rstrip(REPLACEMENT))


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_tokenizer(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]()
    some = st.integers(0, len(tokenizer) - 1) | st.sampled_from(ids_of(tokenizer, "東😀é"))
    ids = data.draw(st.lists(some, max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == whole_text(tokenizer, ids)
    stop = data.draw(STOPS)
    assert "".join(pieces_of(tokenizer, ids, stop)) == slow_text(tokenizer, ids, stop)


@given(st.data())
def test_any_tokens_of_a_sentence_piece_tokenizer_give_its_well_formed_text(
    data: st.DataObject,
) -> None:
    tokenizer = sentence_piece()
    some = st.integers(0, len(tokenizer) - 1) | st.sampled_from(ids_of(tokenizer, "é東😀"))
    ids = data.draw(st.lists(some, max_size=40))
    text, expected = "".join(pieces_of(tokenizer, ids)), whole_text(tokenizer, ids)
    if REPLACEMENT not in expected:
        assert text == expected
    readable = [tokenizer.convert_ids_to_tokens(token) for token in ids]
    if all(not token.startswith("<0x") for token in readable):
        assert text == expected


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(text=SENTENCES.filter(lambda text: REPLACEMENT not in text), stop=STOPS)
def test_no_piece_holds_part_of_a_character_or_of_a_stop_string(
    name: str, text: str, stop: list[str]
) -> None:
    tokenizer = TOKENIZERS[name]()
    detokenizer = Detokenizer(tokenizer, tuple(stop))
    for token in ids_of(tokenizer, text):
        assert REPLACEMENT not in detokenizer.push(token)
        shown, whole = detokenizer.text, text.removeprefix(" ")
        assert whole.startswith(shown)
        assert not any(string in shown for string in stop)
        if not detokenizer.stopped:  # nothing of a stop string that is yet to come is shown
            begins = [whole.find(string) for string in stop if string in whole]
            assert len(shown) <= min(begins, default=len(whole))


def test_text_that_might_begin_a_stop_string_is_held_back(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ("there!",))
    shown = [detokenizer.push(token) for token in ids_of(tokenizer, "Is there a")]
    assert "".join(shown) + detokenizer.flush() == "Is there a"
    detokenizer = Detokenizer(tokenizer, ("there!",))
    for token in ids_of(tokenizer, "Is there"):
        detokenizer.push(token)
        assert "t" not in detokenizer.text
    for token in ids_of(tokenizer, "!"):
        detokenizer.push(token)
    # SentencePiece puts a space in front of "!", so only the other finds its stop string.
    if detokenizer.stopped:
        assert detokenizer.text == "Is "
        assert detokenizer.push(5) == ""
        assert detokenizer.flush() == ""


def test_the_first_of_two_stop_strings_in_one_token_ends_the_answer(tokenizer: Any) -> None:
    for stop in (("e", "h"), ("h", "e")):
        assert "".join(pieces_of(tokenizer, ids_of(tokenizer, "the"), stop)) == "t"


def test_an_answer_loses_one_leading_space_and_no_more(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "    the")
    expected = whole_text(tokenizer, ids)
    assert expected.startswith("  ")
    assert "".join(pieces_of(tokenizer, ids)) == expected


def test_an_answer_begins_without_a_space(tokenizer: Any) -> None:
    assert pieces_of(tokenizer, ids_of(tokenizer, " there"))[0] in ("", "t", "th", "the", "there")
    assert "".join(pieces_of(tokenizer, ids_of(tokenizer, " there"))) == "there"


def test_special_tokens_show_nothing_and_take_no_space_away(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, " the red")
    middle = len(ids) // 2
    ids = [*ids[:middle], tokenizer.eos_token_id, tokenizer.eos_token_id, *ids[middle:]]
    assert "".join(pieces_of(tokenizer, ids)) == "the red"


@pytest.mark.parametrize("length", [50, 400])
def test_malformed_bytes_cost_no_more(length: int) -> None:
    """One byte that begins no character, then newlines, which are bytes here, too."""
    tokenizer = sentence_piece()
    decoded = 0
    decode = tokenizer.decode

    def counting(ids: list[int], **options: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(decode(ids, **options))

    tokenizer.decode = counting
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<0xE6>", *["<0x0A>"] * (length - 1)])
    for token in ids:
        detokenizer.push(token)
    detokenizer.flush()
    assert detokenizer.text.count("\n") + detokenizer.text.count(REPLACEMENT) >= length - 1
    assert decoded < len(ids) * 20 * MAX_UNREADABLE_TOKENS


@pytest.mark.parametrize("length", [50, 400])
def test_a_token_costs_the_same_in_a_long_answer(tokenizer: Any, length: int) -> None:
    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        decoded = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.decoded += len(ids)
            return str(tokenizer.decode(ids, **options))

    for text in ("the red 東 😀 ", "\N{REPLACEMENT CHARACTER}"):
        counting = Counting()
        detokenizer = Detokenizer(counting)
        ids = (ids_of(tokenizer, text) * length)[:length]
        for token in ids:
            detokenizer.push(token)
        assert counting.decoded < len(ids) * 10 * MAX_UNREADABLE_TOKENS
