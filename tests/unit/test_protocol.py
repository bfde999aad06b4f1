"""What a turn's inputs may be, and what is said of those that may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_triton.contract import protocol
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.contract.settings import Settings

SETTINGS = Settings(max_text_bytes=20, max_images_per_turn=3)


def strings(*items: bytes | str) -> np.ndarray:
    """A BYTES tensor [N], as the Python backend hands it over."""
    array = np.empty(len(items), dtype=np.object_)
    array[:] = items
    return array


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (None, None),
        (strings(b""), None),
        (strings(b"Hello!"), "Hello!"),
        (strings("東京 😀".encode()), "東京 😀"),
        (strings("as str"), "as str"),
        (strings(b" "), " "),
        (strings(b"x" * 20), "x" * 20),
    ],
)
def test_text(array: np.ndarray | None, text: str | None) -> None:
    assert protocol.parse_turn(array, None, SETTINGS) == (text, SamplingParameters())


def test_sampling_parameters() -> None:
    parsed = protocol.parse_turn(None, strings(b'{"max_tokens": 3}'), SETTINGS)
    assert parsed == (None, SamplingParameters(max_tokens=3))
    assert protocol.parse_turn(None, strings(b""), SETTINGS) == (None, SamplingParameters())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (strings(b"a", b"b"), "has the shape [2]; it must be [1]"),
        (strings(), "has the shape [0]"),
        (strings(b"a").reshape(1, 1), "has the shape [1, 1]"),
        (strings(b"x" * 21), "is 21 bytes long; the limit is 20: shorten it"),
        (strings("äöü".encode() + b"\xff!"), "is not UTF-8: its byte 6 is 0xff"),
        (strings(b"\xf0\x9f\x98"), "is not UTF-8: its byte 0 is 0xf0"),
        (strings(b"\xed\xa0\x80"), "is not UTF-8: its byte 0 is 0xed"),
    ],
)
@pytest.mark.parametrize("name", ["text_input", "sampling_parameters"])
def test_bad_strings_are_named(name: str, array: np.ndarray, said: str) -> None:
    arguments: tuple[Any, Any] = (array, None) if name == "text_input" else (None, array)
    with pytest.raises(SessionError) as caught:
        protocol.parse_turn(*arguments, SETTINGS)
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert caught.value.sentence.startswith(name)
    assert said in caught.value.sentence


def test_pictures() -> None:
    assert protocol.image_items(None, SETTINGS) == []
    assert protocol.image_items(strings(), SETTINGS) == []
    assert protocol.image_items(strings(b""), SETTINGS) == []
    assert protocol.image_items(strings(b"\x89PNG", "iVBOR"), SETTINGS) == [b"\x89PNG", b"iVBOR"]
    assert protocol.image_items(strings(b"a", b"b", b"c"), SETTINGS) == [b"a", b"b", b"c"]
    assert protocol.image_items(strings(b"a", b""), SETTINGS) == [b"a", b""]


def test_too_many_pictures_and_bad_shapes_are_refused() -> None:
    with pytest.raises(SessionError, match="image holds 4 pictures; a turn takes at most 3"):
        protocol.image_items(strings(b"a", b"b", b"c", b"d"), SETTINGS)
    narrow = Settings(max_images_bytes_per_turn=5)
    assert len(protocol.image_items(strings(b"aa", b"bbb"), narrow)) == 2
    with pytest.raises(SessionError, match="2 pictures of 6 bytes together; the limit is 5"):
        protocol.image_items(strings(b"aaa", b"bbb"), narrow)
    with pytest.raises(SessionError, match=r"image has the shape \[2, 1\]"):
        protocol.image_items(strings(b"a", b"b").reshape(2, 1), SETTINGS)
