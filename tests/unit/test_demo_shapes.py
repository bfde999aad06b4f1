"""The generated pictures and conversations that the demo checkpoint learns from."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers import LlavaProcessor

from demo.build import build_processor
from demo.conversations import NUMBERS, Conversation, Wanted, describe, random_conversation
from demo.data import EVALUATION, TRAINING, VALIDATION, encode, normalized, pixels, stream
from demo.shapes import COLORS, FORMS, PLACES, SIZES, Scene, draw, outline, random_scene
from tests.properties import given

NOUN = re.compile(
    rf"(?P<size>{'|'.join(SIZES)})? ?(?P<color>{'|'.join(COLORS)})? ?"
    rf"(?P<form>{'|'.join(FORMS)}|shape|one)(?:es|s)?\b"
)


PROCESSOR = build_processor()


def wanted(text: str) -> Wanted:
    """The description of shapes in a text, read without the code that wrote it."""
    # The last one: "Which shape is the red circle?"
    *_, found = NOUN.finditer(text.lower())
    form = found["form"] if found["form"] in FORMS else ""
    return Wanted(form, found["color"] or "", found["size"] or "")


def conversations(count: int = 400) -> list[Conversation]:
    return [random_conversation(random.Random(seed), turns=9) for seed in range(count)]


def turns_with_scenes(count: int = 400) -> list[tuple[Any, Scene]]:
    pairs = []
    for conversation in conversations(count):
        arrived = 0
        for turn in conversation.turns:
            arrived += turn.picture
            if arrived:
                pairs.append((turn, conversation.scenes[arrived - 1]))
    return pairs


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return PROCESSOR


def test_same_seed_same_picture_and_conversation() -> None:
    first, again = (random_conversation(random.Random(3), 9) for _ in range(2))
    assert first == again
    one, two = (np.asarray(draw(some.scenes[0], 200)) for some in (first, again))
    assert np.array_equal(one, two)
    assert random_conversation(random.Random(4), 9) != first


def test_every_shape_stays_in_its_own_cell() -> None:
    for seed in range(300):
        scene = random_scene(random.Random(seed))
        cells = [shape.cell for shape in scene.shapes]
        assert cells == sorted(set(cells)), "one shape a cell, in reading order"
        for shape in scene.shapes:
            assert {(int(x * 3), int(y * 3)) for x, y in outline(shape)} == {
                (shape.cell % 3, shape.cell // 3)
            }


def test_shapes_are_drawn_where_and_as_the_scene_says() -> None:
    for seed in range(60):
        scene = random_scene(random.Random(seed))
        picture = draw(scene, 240)
        assert min(picture.size) == 240
        left, top = (picture.width - 240) / 2, (picture.height - 240) / 2
        for shape in scene.shapes:
            drawn = picture.getpixel((round(left + shape.x * 240), round(top + shape.y * 240)))
            assert drawn == shape.rgb
        assert picture.getpixel((0, 0)) == scene.background


def test_the_shape_asked_about_is_the_only_one() -> None:
    checked = 0
    for turn, scene in turns_with_scenes():
        if turn.kind in ("color", "where", "size", "form", "yes or no", "missing"):
            found = wanted(turn.question).among(scene.shapes)
            assert len(found) == (0 if turn.kind == "missing" else 1), turn
            checked += 1
            if turn.kind == "color":
                assert turn.answer.endswith(f" is {found[0].color}.")
            elif turn.kind == "size":
                assert turn.answer.endswith(f" is {found[0].size}.")
            elif turn.kind == "where":
                assert turn.answer.endswith(f" is {PLACES[found[0].cell]}.")
            elif turn.kind == "form":
                assert turn.answer.endswith(f" {found[0].form}.")
            elif turn.kind == "yes or no":
                truth = {found[0].color, found[0].size}
                guess = turn.question.lower().rstrip("?").split()[-1]
                assert turn.answer.startswith("Yes" if guess in truth else "No")
    assert checked > 500


def test_counts_agree_with_the_scene() -> None:
    checked = 0
    for turn, scene in turns_with_scenes():
        if turn.kind == "count":
            number = len(wanted(turn.question.replace("objects", "shapes")).among(scene.shapes))
            assert turn.answer.split()[2] == NUMBERS[number], turn
            checked += 1
        elif turn.kind == "describe":
            assert turn.answer == describe(scene)
            assert turn.answer.count(" at the ") + turn.answer.count(" on the ") + (
                turn.answer.count(" in the ")
            ) == len(scene.shapes)
    assert checked > 300


def test_follow_ups_follow_something() -> None:
    follow_ups = 0
    for conversation in conversations():
        assert not conversation.turns[0].follow_up
        for before, turn in pairwise(conversation.turns):
            if turn.follow_up:
                follow_ups += 1
                assert not turn.picture
                assert before.kind not in ("small talk", "no picture", "colors")
    assert follow_ups > 500


def test_before_the_first_picture_there_is_nothing_to_see() -> None:
    early = 0
    for conversation in conversations():
        for turn in conversation.turns:
            if turn.picture:
                break
            early += 1
            assert turn.kind in ("no picture", "small talk")
    assert early > 10


def test_training_and_evaluation_share_nothing() -> None:
    seen = {
        purpose: {repr(random_conversation(stream(purpose, i), 9)) for i in range(200)}
        for purpose in (TRAINING, VALIDATION, EVALUATION)
    }
    assert not seen[TRAINING] & seen[EVALUATION]
    assert not seen[VALIDATION] & seen[EVALUATION]


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = PROCESSOR.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for turn in conversation.turns:
        image = [{"type": "image"}] if turn.picture else []
        made.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        made.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return made


def test_the_template_is_llavas(processor: LlavaProcessor) -> None:
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "How many?"}, {"type": "image"}]},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "And red?"},
    ]
    assert processor.apply_chat_template(talk, add_generation_prompt=True) == (
        "USER: <image>\nHow many? ASSISTANT: Three.</s>USER: And red? ASSISTANT:"
    )


def test_every_prompt_is_the_beginning_of_the_whole_conversation(processor: LlavaProcessor) -> None:
    for conversation in conversations(20):
        talk = messages(conversation)
        images = [draw(scene, 120) for scene in conversation.scenes]
        whole = processor(text=processor.apply_chat_template(talk), images=images)["input_ids"][0]
        pieces = encode(conversation, processor, image_tokens=36)
        assert [token for piece in pieces for token in piece] == whole, "training sees the same"
        at = 0
        for turn in range(len(conversation.turns)):
            at += len(pieces[2 * turn])
            prompt = processor.apply_chat_template(talk[: 2 * turn + 1], add_generation_prompt=True)
            shown = images[: sum(some.picture for some in conversation.turns[: turn + 1])]
            ids = processor(text=prompt, images=shown or None)["input_ids"][0]
            assert ids == whole[:at]
            at += len(pieces[2 * turn + 1])


def test_training_sees_the_pixels_that_the_processor_makes(processor: LlavaProcessor) -> None:
    images = [draw(random_scene(random.Random(seed)), 150 + 10 * seed) for seed in range(8)]
    ours = normalized(torch.from_numpy(pixels(images, processor)), processor)
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
