"""Many sessions with pictures of their own ask at once: every answer is about its own picture."""

from __future__ import annotations

import io
import random
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from PIL import Image

from demo.conversations import describe
from demo.evaluate import answers, load
from demo.shapes import Scene, draw, random_scene
from llava_triton.server.triton_server import TritonServer
from tests.checkpoints import DEMO
from tests.triton import Answer, Stream, whole

SESSIONS = 64
QUESTIONS = ("Describe the picture.", "Which colors are there?")
LIMIT = {"max_tokens": 96}
LEAST_DISTINCT = 56
"""Descriptions of 64 random pictures are hardly ever equal: a mixed-up one would be seen."""


def scene(number: int) -> Scene:
    return random_scene(random.Random(f"crosstalk {number}"))


SCENES = [scene(number) for number in range(SESSIONS)]
PICTURES = [draw(each, 120) for each in SCENES]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def expected() -> list[list[str]]:
    """For every question the answer about each picture, by plain transformers: every turn of all
    conversations in one padded batch, with nothing in it that could be remembered."""
    model, processor = load(DEMO)
    histories: list[list[dict[str, object]]] = [[] for _ in PICTURES]
    given = []
    for question in QUESTIONS:
        for history in histories:
            shown = [] if history else [{"type": "image"}]
            content = [*shown, {"type": "text", "text": question}]
            history.append({"role": "user", "content": content})
        texts = answers(model, processor, histories, [[picture] for picture in PICTURES])
        for history, text in zip(histories, texts, strict=True):
            said = {"type": "text", "text": text}
            history.append({"role": "assistant", "content": [said]})
        given.append(texts)
    return given


@pytest.fixture
def streams(server: TritonServer) -> Iterator[list[Stream]]:
    """One for every session, as if each had a client of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(Stream(server.grpc_address)) for _ in PICTURES]


def all_at_once(
    streams: list[Stream],
    sessions: list[str],
    text: str | None,
    pictures: list[bytes] | None = None,
    *,
    start: bool = False,
    end: bool = False,
) -> list[Answer]:
    """The same turn of every session; the first answer is looked at when the last has been sent."""
    for index, (stream, session) in enumerate(zip(streams, sessions, strict=True)):
        stream.send(
            text,
            session=session,
            images=[pictures[index]] if pictures else None,
            parameters=LIMIT,
            start=start,
            end=end,
        )
    return [whole(stream.pieces()) for stream in streams]


def test_the_expected_answers_tell_pictures_apart(expected: list[list[str]]) -> None:
    descriptions = expected[0]
    assert len(set(descriptions)) >= LEAST_DISTINCT
    right = sum(text == describe(scene) for text, scene in zip(descriptions, SCENES, strict=True))
    assert right >= 0.95 * SESSIONS


@pytest.mark.parametrize("opened_with_the_question", [False, True])
def test_every_answer_is_about_its_own_picture(
    streams: list[Stream], expected: list[list[str]], opened_with_the_question: bool
) -> None:
    sessions = [uuid.uuid4().hex for _ in PICTURES]
    pictures = [png(picture) for picture in PICTURES]
    if opened_with_the_question:
        first = all_at_once(streams, sessions, QUESTIONS[0], pictures, start=True)
    else:
        opened = all_at_once(streams, sessions, None, pictures, start=True)
        assert {answer.finish_reason for answer in opened} == {"prefilled"}
        first = all_at_once(streams, sessions, QUESTIONS[0])
    assert [answer.text for answer in first] == expected[0]
    for number, question in enumerate(QUESTIONS[1:], start=1):
        last = number == len(QUESTIONS) - 1
        given = all_at_once(streams, sessions, question, end=last)
        assert [answer.text for answer in given] == expected[number]


def test_pictures_that_arrive_in_turn_with_other_sessions(
    streams: list[Stream], expected: list[list[str]]
) -> None:
    """Each session is opened on its neighbour's picture first, so that IDs say nothing."""
    sessions = [uuid.uuid4().hex for _ in PICTURES]
    pictures = [png(picture) for picture in PICTURES]
    neighbours = [*pictures[1:], pictures[0]]
    first = all_at_once(streams, sessions, QUESTIONS[0], neighbours, start=True)
    assert [answer.text for answer in first] == [*expected[0][1:], expected[0][0]]
    again = all_at_once(streams, sessions, QUESTIONS[0], pictures, start=True, end=True)
    assert [answer.text for answer in again] == expected[0]
