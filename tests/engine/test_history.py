"""Sessions that open with a history: as if its turns had taken place in them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.history import PastTurn, history_from_json, history_to_json
from llava_triton.conversation.prompt import Prompt
from llava_triton.conversation.renderer import ConversationRenderer
from tests.conftest import ROOT
from tests.engine.test_engine import DEMO, QUESTIONS, picture
from tests.engine_harness import EngineHarness
from tests.reference import TransformersChat
from tests.triton import Asker

TOLD = (
    PastTurn("What is in the picture?", "a red  square, é 漢字!", 1),
    PastTurn("Sure?", ""),
    PastTurn("And these?", "two more.", 2),
)
SHOWN = [picture(color) for color in ("red", "blue", "green", "black")]


@pytest.fixture
def harness() -> Iterator[EngineHarness]:
    harness = EngineHarness(DEMO)
    yield harness
    harness.shutdown()


def expected_answers(last: Image.Image | None) -> list[str]:
    """To two more questions after TOLD, by plain transformers."""
    reference = TransformersChat(DEMO)
    pictures = iter(SHOWN)
    for turn in TOLD:
        shown = [next(pictures) for _ in range(turn.images)]
        reference.say(turn.text, shown, answer=turn.answer)
    images = [] if last is None else [last]
    return [reference.answer(QUESTIONS[1], images), reference.answer(QUESTIONS[2])]


@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_answers_are_those_of_the_whole_conversation(
    harness: EngineHarness, with_picture: bool, at_once: bool
) -> None:
    last = SHOWN[3] if with_picture else None
    images = SHOWN if with_picture else SHOWN[:3]
    if at_once:
        first, _ = harness.ask("s", QUESTIONS[1], images, start=True, history=TOLD)
    else:
        text, final = harness.ask("s", None, images, start=True, history=TOLD)
        assert (text, final.finish_reason) == ("", "prefilled")
        first, final = harness.ask("s", QUESTIONS[1])
        assert final.num_cached_tokens > 3 * harness.runner.picture_tokens
    assert [first, harness.ask("s", QUESTIONS[2])[0]] == expected_answers(last)


def test_a_history_without_a_picture(harness: EngineHarness) -> None:
    reference = TransformersChat(DEMO)
    reference.say("Hello!", answer="Hi.")
    told = (PastTurn("Hello!", "Hi."),)
    assert harness.ask("s", QUESTIONS[0], start=True, history=told)[0] == reference.answer(
        QUESTIONS[0]
    )


def test_a_lost_session_comes_back(harness: EngineHarness) -> None:
    """Opened with what was said in it, a session has the very tokens of the lost one."""
    told: list[PastTurn] = []
    for index, question in enumerate(QUESTIONS):
        shown = [SHOWN[index]] if index < 2 else []
        answer, _ = harness.ask("lost", question, shown, start=index == 0)
        told.append(PastTurn(question, answer, len(shown)))
    harness.ask(
        "back", None, SHOWN[:2], start=True, history=history_from_json(history_to_json(told))
    )
    assert harness.history("back") == harness.history("lost")
    assert harness.ask("back", "And?")[0] == harness.ask("lost", "And?")[0]
    harness.ask("lost", end=True)
    harness.ask("back", end=True)
    harness.assert_nothing_is_held()


def test_only_an_opening_has_a_history(harness: EngineHarness) -> None:
    harness.ask("s", QUESTIONS[0], start=True)
    with pytest.raises(SessionError, match="history came with a turn of an open session") as told:
        harness.ask("s", QUESTIONS[0], history=TOLD[1:2])
    assert told.value.code is ErrorCode.INVALID_ARG
    with pytest.raises(SessionError, match="speaks of 3 pictures and 'image' holds 2"):
        harness.ask("t", QUESTIONS[0], SHOWN[:2], start=True, history=TOLD)
    harness.ask("s", end=True)
    harness.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ((PastTurn("a", "b", 10**12),), "speaks of 1000000000000 pictures"),
        ((PastTurn("a", "b"),) * 10_000, "at least"),
        ((PastTurn("a " * 100_000, "b"),), "at least"),
    ],
    ids=["pictures", "turns", "text"],
)
def test_a_history_that_never_fits_costs_next_to_nothing(
    harness: EngineHarness,
    history: tuple[PastTurn, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered: list[str] = []
    message = ConversationRenderer.message

    def noting(renderer: ConversationRenderer, *arguments: Any) -> Prompt:
        rendered.append(threading.current_thread().name)
        return message(renderer, *arguments)

    monkeypatch.setattr(ConversationRenderer, "message", noting)
    with pytest.raises(SessionError, match=said) as told:
        harness.ask("s", None, SHOWN[:1], start=True, history=history)
    assert told.value.code is ErrorCode.INVALID_ARG
    # On no thread that others wait for, neither the engine's nor the caller's, and not to the end.
    assert not {"engine", threading.current_thread().name} & set(rendered)
    assert len(rendered) < harness.runner.context_length
    harness.assert_nothing_is_held()


def test_through_the_server(asker: Asker) -> None:
    limit = {"max_tokens": 12}
    image = min((ROOT / "examples" / "pictures").glob("*.png")).read_bytes()
    question = "How many shapes are there?"
    first = asker(question, session="first", images=[image], start=True, parameters=limit)
    told = [{"text": question, "answer": first.text, "images": 1}]
    second = asker("What colour?", session="first", parameters=limit, end=True)
    opening = {"images": [image], "history": told, "start": True}
    again = asker("What colour?", session="again", parameters=limit, end=True, **opening)
    assert again.text == second.text
    assert again.num_input_tokens == second.num_input_tokens
