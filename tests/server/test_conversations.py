"""Whole conversations through the real server, token for token those of plain transformers."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils
from PIL import Image
from transformers.image_utils import load_image

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.families import family_of
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.checkpoints import tiny_llava
from tests.reference import TransformersChat
from tests.triton import Asker, ask

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "checkpoint"
PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.*"))
QUESTIONS = (
    "How many shapes are there?",
    "Describe the picture.",
    "Is there a red circle?",
    "And what about é, 漢字 and 🙂?",
)
LIMIT = {"max_tokens": 32}
LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
}
"""Rotary embeddings as Llama 3.1's checkpoints scale them, for another length."""


def new_session() -> str:
    return uuid.uuid4().hex


def load(file: Path) -> Image.Image:
    """A picture as transformers' own loader gives it."""
    image: Image.Image = load_image(str(file))
    return image


@pytest.mark.parametrize("picture", PICTURES, ids=lambda file: file.name)
def test_a_conversation_equals_transformers(asker: Asker, picture: Path) -> None:
    reference = TransformersChat(DEMO)
    session = new_session()
    for index, question in enumerate(QUESTIONS):
        expected = reference.ask(question, [load(picture)] if index == 0 else [])
        answer = asker(
            question,
            session=session,
            images=[picture.read_bytes()] if index == 0 else None,
            parameters=LIMIT,
            start=index == 0,
        )
        assert answer.text == reference.decode(expected)
        assert answer.num_output_tokens == len(expected)
    assert asker(session=session, end=True).finish_reason == "closed"


def test_a_second_picture_joins_the_conversation(asker: Asker) -> None:
    reference = TransformersChat(DEMO)
    first, second = PICTURES[:2]
    session = new_session()
    asker(session=session, images=[first.read_bytes()], start=True)
    answer = asker(QUESTIONS[0], session=session, parameters=LIMIT)
    assert answer.text == reference.answer(QUESTIONS[0], [load(first)])
    answer = asker(
        QUESTIONS[1], session=session, images=[second.read_bytes()], parameters=LIMIT, end=True
    )
    assert answer.text == reference.answer(QUESTIONS[1], [load(second)])


def test_pictures_stand_where_the_client_puts_them(asker: Asker) -> None:
    reference = TransformersChat(DEMO)
    session = new_session()
    files = PICTURES[:3]
    turns: list[tuple[str, list[Path], list[int] | None]] = [
        ("Is this  or this  redder, é?", files[:2], [8, 17]),
        (QUESTIONS[0], [], None),
        ("Look: ", files[2:], [6]),
        (QUESTIONS[1], files[:1], [0]),
    ]
    past: list[dict[str, Any]] = []
    for index, (question, shown, positions) in enumerate(turns):
        expected = reference.answer(question, [load(each) for each in shown], positions=positions)
        answer = asker(
            question,
            session=session,
            images=[each.read_bytes() for each in shown] or None,
            positions=positions,
            parameters=LIMIT,
            start=index == 0,
        )
        assert answer.text == expected
        past.append({"text": question, "answer": answer.text, "images": len(shown)})
        if positions is not None:
            past[-1]["image_positions"] = positions
    expected = reference.answer(QUESTIONS[2])
    answer = asker(
        QUESTIONS[2],
        session=new_session(),
        images=[each.read_bytes() for _, shown, _ in turns for each in shown],
        history=past,
        parameters=LIMIT,
        start=True,
        end=True,
    )
    assert answer.text == expected


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([0], "has 1 numbers and the turn has 2 pictures"),
        ([0, 16], "names position 16 and text_input has 15 characters"),
        ([3, 2], "is not in ascending order"),
        ([0, True], "holds something other than whole numbers"),
        ({"0": 1}, "is no list"),
        ("[", "is not valid JSON"),
    ],
)
def test_places_that_are_none(asker: Asker, positions: Any, said: str) -> None:
    pictures = [each.read_bytes() for each in PICTURES[:2]]
    with pytest.raises(tritonclient.utils.InferenceServerException, match=said) as caught:
        asker(
            "Is this or this",
            session=new_session(),
            images=pictures,
            positions=positions,
            start=True,
        )
    assert "INVALID_ARG: image_positions" in caught.value.message()


def test_later_turns_compute_only_what_is_new(asker: Asker, http_client: Any) -> None:
    def encoded() -> int:
        statistics = http_client.get_inference_statistics("vision_encoder")["model_stats"][0]
        return int(statistics["inference_count"])

    session, before = new_session(), encoded()
    picture = never_seen_picture()
    opened = asker(session=session, images=[picture], start=True)
    assert opened.finish_reason == "prefilled"
    assert opened.num_cached_tokens < BLOCK_TOKENS  # no more than the template's beginning
    seen = opened.num_input_tokens
    for question in QUESTIONS:
        answer = asker(question, session=session, parameters={"max_tokens": 5})
        assert answer.num_cached_tokens >= seen - 1
        seen = answer.num_input_tokens + answer.num_output_tokens
    assert encoded() - before == 1


def test_a_picture_shown_again_is_neither_encoded_nor_prefilled_again(
    asker: Asker, http_client: Any
) -> None:
    picture = never_seen_picture()
    first, second = new_session(), new_session()
    opened = asker(session=first, images=[picture], start=True)
    encoded = http_client.get_inference_statistics("vision_encoder")["model_stats"][0]
    shared = asker(session=second, images=[picture], start=True)
    again = http_client.get_inference_statistics("vision_encoder")["model_stats"][0]
    assert again["inference_count"] == encoded["inference_count"]
    assert shared.num_cached_tokens > opened.num_input_tokens - 2 * BLOCK_TOKENS
    answers = [asker(QUESTIONS[0], session=each, end=True).text for each in (first, second)]
    assert answers[0] == answers[1]


def never_seen_picture() -> bytes:
    picture = io.BytesIO()
    Image.frombytes("RGB", (64, 48), os.urandom(64 * 48 * 3)).save(picture, "PNG")
    return picture.getvalue()


@pytest.mark.parametrize("session", ["seven-7", 77_777_777_777, 7])
def test_string_and_integer_ids(asker: Asker, session: str | int) -> None:
    reference = TransformersChat(DEMO)
    picture = PICTURES[0]
    asker(session=session, images=[picture.read_bytes()], start=True)
    answer = asker(QUESTIONS[0], session=session, parameters=LIMIT, end=True)
    assert answer.text == reference.answer(QUESTIONS[0], [load(picture)])


@pytest.mark.parametrize(
    "shape",
    [
        {"text": "mistral", "kv_heads": 2, "image_size": 112, "seed": 3},
        {"text": "qwen2", "kv_heads": 1, "image_size": 56, "seed": 4},
        {"vision": "siglip", "text": "qwen2", "vision_feature_select_strategy": "full", "seed": 6},
        {"vision": "siglip", "kv_heads": 2, "vision_feature_layer": -1, "seed": 7},
    ],
    ids=["mistral", "qwen2", "SigLIP, every patch", "SigLIP without the first patch"],
)
def test_other_checkpoints_equal_transformers(shape: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", **shape)
    repository = tmp_path / "repository"
    subprocess.run(
        [sys.executable, "-m", "llava_export", "--model", checkpoint, "--output", repository],
        check=True,
    )
    reference = TransformersChat(checkpoint)
    picture = PICTURES[0]
    with (
        TritonServer(repository, *free_ports(3)) as server,
        tritonclient.http.InferenceServerClient(server.http_address) as client,
    ):
        session = new_session()
        for index, question in enumerate(QUESTIONS):
            images = [picture] if index in (0, 2) else []
            expected = reference.answer(question, [load(file) for file in images])
            answer = ask(
                client,
                question,
                session=session,
                images=[file.read_bytes() for file in images] or None,
                parameters=LIMIT,
                start=index == 0,
            )
            assert answer.text == expected


@pytest.mark.parametrize(
    "shape",
    [
        {"family": "llava_next", "text": "mistral", "kv_heads": 2, "seed": 8},
        {"family": "llava_next", "seed": 9, "text_options": LLAMA_3},
        {"family": "llava_onevision", "vision": "siglip", "text": "qwen2", "kv_heads": 1},
    ],
    ids=["NeXT, Mistral", "NeXT, Llama 3", "OneVision"],
)
def test_pictures_in_tiles_equal_transformers(shape: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", **shape)
    repository = tmp_path / "repository"
    subprocess.run(
        [sys.executable, "-m", "llava_export", "--model", checkpoint, "--output", repository],
        check=True,
    )
    reference = TransformersChat(checkpoint)
    family, tiles = family_of(llava_config(checkpoint)), 0
    with (
        TritonServer(repository, *free_ports(3)) as server,
        tritonclient.http.InferenceServerClient(server.http_address) as client,
    ):
        for sizes in (((64, 48), (400, 90)), ((90, 400), (1, 1)), ((330, 340), (56, 112))):
            reference.restart()
            session, seen = new_session(), 0
            for index, question in enumerate(QUESTIONS):
                width, height = sizes[index // 2]
                pictures = [noise(width, height)] if index in (0, 2) else []
                tiles += len(pictures) * family.num_tiles(height, width)
                expected = reference.answer(question, [load_bytes(each) for each in pictures])
                answer = ask(
                    client,
                    question,
                    session=session,
                    images=pictures or None,
                    parameters=LIMIT,
                    start=index == 0,
                )
                assert answer.text == expected
                assert answer.num_input_tokens + answer.num_output_tokens == reference.num_tokens
                # The answer's last token was said and not computed with.
                assert answer.num_cached_tokens >= seen - 1
                seen = reference.num_tokens
        statistics = client.get_inference_statistics("vision_encoder")["model_stats"][0]
        assert int(statistics["inference_count"]) == tiles


def noise(width: int, height: int) -> bytes:
    """A picture whose every pixel matters."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    return picture.getvalue()


def load_bytes(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def test_pictures_of_every_kind_give_the_same_answers_encoded_differently(
    http_client: Any,
) -> None:
    buffer = io.BytesIO()
    load(PICTURES[0]).save(buffer, "PNG")
    raw = buffer.getvalue()
    text = base64.b64encode(raw)
    answers = set()
    for form in (raw, text, b"data:image/png;base64," + text):
        answer = ask(
            http_client, QUESTIONS[1], session=new_session(), images=[form], start=True, end=True
        )
        answers.add(answer.text)
    assert len(answers) == 1
