"""Bad input: one clear error with the right code, and the session goes on as if nothing was."""

from __future__ import annotations

import io
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from llava_triton.contract.errors import ErrorCode, error_from_text
from tests.triton import Asker, ask, inputs

PICTURES = sorted((Path(__file__).resolve().parents[2] / "examples" / "pictures").glob("*.*"))
LIMIT = {"max_tokens": 24}
HALF = '[{"text": "\\ud800", "answer": ""}]'
QUESTIONS = ("Describe the picture.", "How many shapes are there?")


def _png(width: int, height: int) -> bytes:
    """A tiny PNG file that claims to be `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def _case(code: ErrorCode, sentence: str, **turn: Any) -> Any:
    return pytest.param(code, sentence, turn, id=sentence)


INVALID = ErrorCode.INVALID_ARG
HELLO: dict[str, Any] = {"text": "Hello!", "answer": "Hi."}
CASES = [
    _case(INVALID, "is no picture", text="?", images=[b"\x00\x01 this is no picture"]),
    _case(INVALID, "looks like base64 text but is not", text="?", images=[b"aGVsbG8=hello"]),
    _case(INVALID, "is no picture: 5 bytes", text="?", images=[b"aGVsbG8="]),
    _case(INVALID, "damaged or cut off", text="?", images=[_jpeg()[:-2000]]),
    _case(
        INVALID, "400000000 pixels; the limit is 50000000", text="?", images=[_png(20000, 20000)]
    ),
    _case(INVALID, "image 2 of 2 is no picture", images=[PICTURES[0].read_bytes(), b"\x01\x02"]),
    _case(INVALID, "a turn takes at most 64", text="?", images=[PICTURES[0].read_bytes()] * 65),
    _case(INVALID, "neither text_input nor image"),
    _case(INVALID, "neither text_input nor image", text=""),
    _case(INVALID, "image holds 2000000 pictures", text="?", images=[b""] * 2_000_000),
    _case(INVALID, "bytes long; the limit is 33554432", text="?", images=[b"A" * (70 << 20)]),
    _case(INVALID, "half of a surrogate pair", text="?", history=HALF),
    _case(INVALID, "context is 1024", text="many words " * 2000),
    _case(INVALID, "the limit is 262144", text="x" * 300_000),
    _case(INVALID, "is not UTF-8", text=b"caf\xe9"),
    _case(INVALID, "max_tokens is 0", text="?", parameters={"max_tokens": 0}),
    _case(INVALID, 'max_tokens is "9"', text="?", parameters={"max_tokens": "9"}),
    _case(INVALID, "temperature is -1", text="?", parameters={"temperature": -1}),
    _case(INVALID, "NaN is no JSON number", text="?", parameters='{"temperature": NaN}'),
    _case(INVALID, "top_p is 0", text="?", parameters={"top_p": 0}),
    _case(INVALID, "top_k is true", text="?", parameters={"top_k": True}),
    _case(INVALID, "seed is -1", text="?", parameters={"seed": -1}),
    _case(INVALID, "stop is [1]", text="?", parameters={"stop": [1]}),
    _case(INVALID, 'unknown name "beams"', text="?", parameters={"beams": 4}),
    _case(INVALID, "has the unknown name", text="?", parameters='{"\\ud800": 1}'),
    _case(INVALID, "max_seconds is 0", text="?", parameters={"max_seconds": 0}),
    _case(INVALID, "history came with a turn of an open", text="?", history=[HELLO]),
    _case(INVALID, "history is not valid JSON", text="?", history="[", start=True),
    _case(INVALID, "history is no JSON list", text="?", history={}, start=True),
    _case(INVALID, "a turn 1 that is no object", text="?", history=["Hi"], start=True),
    _case(INVALID, "a turn 2 without an answer", text="?", history=[HELLO, {"text": "?"}]),
    _case(INVALID, "speaks of 2 pictures", text="?", history=[HELLO | {"images": 2}], start=True),
    _case(INVALID, "not valid JSON", text="?", parameters="{max_tokens: 4}"),
    _case(INVALID, "give a JSON object", text="?", parameters="[4]"),
    _case(INVALID, "sampling_parameters is not UTF-8", text="?", parameters=b'{"stop": "\xff"}'),
]


def refusal(asker: Asker, **turn: Any) -> Any:
    with pytest.raises(InferenceServerException) as caught:
        asker(**turn)
    return caught.value


@pytest.mark.parametrize(("code", "sentence", "turn"), CASES)
def test_a_bad_turn_changes_nothing(
    asker: Asker, code: ErrorCode, sentence: str, turn: dict[str, Any]
) -> None:
    picture = [PICTURES[0].read_bytes()]
    session, undisturbed = uuid.uuid4().hex, uuid.uuid4().hex
    expected = []
    for name in (undisturbed, session):
        expected.append(
            asker(QUESTIONS[0], session=name, images=picture, start=True, parameters=LIMIT).text
        )
    expected_next = asker(QUESTIONS[1], session=undisturbed, parameters=LIMIT, end=True).text
    error = refusal(asker, session=session, **turn)
    told = error_from_text(error.message())
    assert told.code is code
    assert sentence in told.sentence
    assert len(error.message()) < 500
    if error.status() is not None:  # responses of a stream have no status of their own
        assert error.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    after = asker(QUESTIONS[1], session=session, parameters=LIMIT, end=True)
    assert expected[0] == expected[1]
    assert after.text == expected_next


@pytest.mark.parametrize("session", ["never-opened", 123_456])
def test_an_unknown_session(asker: Asker, session: str | int) -> None:
    error = refusal(asker, text="Hello?", session=session)
    assert error_from_text(error.message()).code is ErrorCode.NOT_FOUND
    if error.status() is not None:
        assert error.status() in ("404", "StatusCode.NOT_FOUND")


def test_a_closed_session_is_unknown(asker: Asker) -> None:
    asker("Hello!", session="closing", start=True, end=True, parameters=LIMIT)
    error = refusal(asker, text="Hello?", session="closing")
    assert error_from_text(error.message()).code is ErrorCode.NOT_FOUND


def test_no_session_at_all(asker: Asker) -> None:
    error = refusal(asker, text="Hello?")
    assert error_from_text(error.message()).code is ErrorCode.INVALID_ARG


def test_a_session_id_that_is_too_long(asker: Asker) -> None:
    error = refusal(asker, text="Hello?", session="x" * 200, start=True)
    assert "128" in error.message()


def test_a_reused_id_opens_a_new_session(asker: Asker) -> None:
    picture = [PICTURES[0].read_bytes()]
    asker("Hello!", session="reused", images=picture, start=True, parameters=LIMIT)
    answer = asker("Hello!", session="reused", start=True, parameters=LIMIT)
    assert answer.num_cached_tokens == 0
    fresh = asker("Hello!", session="fresh", start=True, end=True, parameters=LIMIT)
    assert answer.text == fresh.text


def test_a_bad_opening_opens_nothing(asker: Asker) -> None:
    session = uuid.uuid4().hex
    refusal(asker, session=session, images=[b"\x01\x02"], start=True)
    error = refusal(asker, text="Hello?", session=session)
    assert error_from_text(error.message()).code is ErrorCode.NOT_FOUND
    answer = asker("Hello!", session=session, start=True, end=True, parameters=LIMIT)
    assert answer.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "turn",
    [
        {"parameters": {"max_tokens": 0}},
        {"history": [HELLO | {"images": 2}]},
        {"history": [HELLO] * 5000},
    ],
    ids=["by the model", "by the engine", "too long"],
)
def test_triton_keeps_no_sequence_of_a_refused_opening(asker: Asker, turn: dict[str, Any]) -> None:
    """It has places for so many, and keeps each until its idle limit."""
    session = uuid.uuid4().hex
    refusal(asker, text="?", session=session, start=True, **turn)
    error = refusal(asker, text="Hello?", session=session)
    assert error_from_text(error.message()).code is ErrorCode.NOT_FOUND
    assert f"session {session!r}" not in error.message()  # the engine's words: it was not asked


def test_a_refused_opening_leaves_an_open_session_of_its_id(asker: Asker) -> None:
    session = uuid.uuid4().hex
    asker("Hello!", session=session, start=True, parameters=LIMIT)
    refusal(asker, text="?", session=session, parameters={"max_tokens": 0}, start=True)
    answer = asker("And now?", session=session, parameters=LIMIT, end=True)
    assert answer.num_cached_tokens > 0


def test_a_client_cannot_speak_as_a_model(grpc_client: Any) -> None:
    """Request parameters by which the models speak with one another mean nothing from outside."""
    session = uuid.uuid4().hex
    ask(grpc_client, "Hello!", session=session, start=True, parameters=LIMIT)
    for name in ("cancel_turn", "release"):
        result = grpc_client.infer(
            "llava",
            inputs(tritonclient.grpc, "Hello?", parameters=LIMIT),
            sequence_id=session,
            parameters={name: session},
        )
        assert result.as_numpy("num_output_tokens")[0] > 0
    ask(grpc_client, session=session, end=True)


def test_a_bad_end_still_ends(asker: Asker) -> None:
    session = uuid.uuid4().hex
    asker("Hello!", session=session, start=True, parameters=LIMIT)
    refusal(asker, text="?", session=session, parameters={"beams": 4}, end=True)
    error = refusal(asker, text="Hello?", session=session)
    assert error_from_text(error.message()).code is ErrorCode.NOT_FOUND
