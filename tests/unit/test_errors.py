"""What is wrong, told by a field here and found again in the text that Triton's protocols carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llava_triton.contract import protocol
from llava_triton.contract.errors import (
    CONNECTION,
    MODEL,
    MODEL_PROCESS,
    SESSION,
    SHARED_MEMORY,
    ErrorCode,
    SessionError,
    error_from_text,
    invalid,
    not_found,
    unavailable,
)
from llava_triton.contract.models import HISTORY, IMAGE, SAMPLING_PARAMETERS, TEXT_INPUT
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import numbered

SETTINGS = Settings(max_text_bytes=200, max_images_per_turn=3)


def array(*items: str | bytes) -> np.ndarray:
    return np.array(items, dtype=np.object_)


def turn(text: np.ndarray | None = None, sampling: np.ndarray | None = None) -> Any:
    return protocol.parse_turn(text, sampling, SETTINGS)


def history(text: str) -> Any:
    return protocol.parse_history(array(text), SETTINGS)


@pytest.mark.parametrize(
    ("refuse", "subject"),
    [
        (lambda: turn(array("a", "b")), TEXT_INPUT.name),
        (lambda: turn(array("a" * 300)), TEXT_INPUT.name),
        (lambda: turn(array(b"\xff")), TEXT_INPUT.name),
        (lambda: turn(sampling=array("a", "b")), SAMPLING_PARAMETERS.name),
        (lambda: turn(sampling=array("{")), SAMPLING_PARAMETERS.name),
        (lambda: turn(sampling=array("7")), SAMPLING_PARAMETERS.name),
        (lambda: turn(sampling=array('{"heat": 1}')), SAMPLING_PARAMETERS.name),
        (lambda: turn(sampling=array('{"top_p": 7}')), SAMPLING_PARAMETERS.name),
        (lambda: history("["), HISTORY.name),
        (lambda: history("{}"), HISTORY.name),
        (lambda: history('[{"text": ""}]'), HISTORY.name),
        (lambda: protocol.image_items(array("a", "b").reshape(1, 2), SETTINGS), IMAGE.name),
        (lambda: protocol.image_items(array(*"abcd"), SETTINGS), IMAGE.name),
        (lambda: protocol.parse_tenant({protocol.TENANT: ""}), ""),
    ],
)
def test_the_checks_of_inputs_name_the_input(refuse: Callable[[], Any], subject: str) -> None:
    with pytest.raises(SessionError) as caught:
        refuse()
    assert caught.value.subject == subject
    told = error_from_text(f"in ensemble 'llava', {caught.value}")
    assert (told.code, told.sentence) == (caught.value.code, caught.value.sentence)
    assert told.subject == subject


@pytest.mark.parametrize(
    "error",
    [
        numbered(invalid("is empty"), 1, 1),
        numbered(invalid("is empty"), 2, 3),
        not_found("session 'a' is unknown or has expired"),
        unavailable("all 3 sessions are in use; try again later"),
        unavailable("image features have no room"),
        invalid("image_features has 3 bytes"),
        invalid("the turn has neither text_input nor image"),
        SessionError(ErrorCode.INTERNAL, "the answer broke off"),
    ],
    ids=str,
)
def test_other_errors_too_are_about_the_same_behind_triton(error: SessionError) -> None:
    told = error_from_text(f"[StatusCode.INTERNAL] in ensemble 'llava', {error}")
    assert (told.code, told.sentence) == (error.code, error.sentence)
    assert told.subject == error.subject


@pytest.mark.parametrize(
    ("text", "code", "subject"),
    [
        ("sequence 1 must specify the START flag", ErrorCode.NOT_FOUND, SESSION),
        ("must provide a non-zero or non-empty correlation ID", ErrorCode.INVALID_ARG, ""),
        ("Stub process 'llava_0' is not healthy.", ErrorCode.INTERNAL, MODEL_PROCESS),
        ("Failed to obtain the health mutex.", ErrorCode.INTERNAL, MODEL_PROCESS),
        ("[StatusCode.UNAVAILABLE] Socket closed", ErrorCode.INTERNAL, CONNECTION),
        ("Request for unknown model: 'a' is not ready", ErrorCode.INTERNAL, MODEL),
        ("model 'a' has no available versions", ErrorCode.INTERNAL, MODEL),
        ("Failed to increase the shared memory pool size", ErrorCode.INTERNAL, SHARED_MEMORY),
        ("anything else", ErrorCode.INTERNAL, ""),
    ],
)
def test_tritons_own_errors(text: str, code: ErrorCode, subject: str) -> None:
    told = error_from_text(text)
    assert (told.code, told.subject) == (code, subject)
