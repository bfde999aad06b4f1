"""What requests say: their parameters by name, and the checks of their inputs.

What a request asks of its session besides a turn (`resume`, `rewind`, `fork` ...) is in
`contract.operations`. Nothing here knows Triton, torch or transformers, so that clients can use
it, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_triton.contract.errors import invalid
from llava_triton.contract.history import PastTurn, history_from_json
from llava_triton.contract.models import (
    HISTORY,
    IMAGE,
    IMAGE_POSITIONS,
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
)
from llava_triton.contract.positions import Positions, positions_from_json
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.contract.settings import Settings
from llava_triton.contract.tensors import TensorSpec

WHOLE_ANSWER = "whole_answer"
"""Request parameter: a token of `whole_answers.Inbox`. The answer is wanted whole and goes there;
the request itself gets an empty response at once."""
CANCEL_TURN = "cancel_turn"
"""Request parameter: the ID of a turn to cancel, which is the request's sequence ID, too, with
START and END; the request has no other meaning."""
TENANT = "tenant"
"""Request parameter: whose request it is, see `parse_tenant`. Tenants share no blocks of keys and
values and no encoded pictures, so neither times nor counts tell one what another has shown or
said."""
NO_TENANT = ""
"""The tenant of all requests that name none."""
ROOM = "room"
"""Request parameter: the ID of a session that is to be opened with pictures, whose decoding takes
time. language_model answers with an error where it could not open now, else with nothing; the
request has no other meaning. It is a sequence of its own, with START and END."""
MARK = "mark"
"""Request parameter of a request without inputs (to language_model, a sequence of its own), which
is answered with nothing: so the model has taken in everything that was passed on to it before."""
RELEASE = "release"
"""Request parameter of an END by language_model to itself, with a value that it alone knows: the
session never opened, and Triton shall know no more of its sequence than the engine does."""


def parse_turn(
    text: np.ndarray | None, sampling: np.ndarray | None, settings: Settings
) -> tuple[str | None, SamplingParameters]:
    """Check a turn's `text_input` and `sampling_parameters`.

    Args:
        text: object [1] holding bytes; None or an empty string: no text.
        sampling: object [1] holding bytes; None or an empty string: the defaults.
        settings: limits.

    Returns:
        The text, None for no text; the sampling parameters.

    Raises:
        SessionError: INVALID_ARG.
    """
    question = _string(TEXT_INPUT, text, settings.max_text_bytes)
    parameters = _string(SAMPLING_PARAMETERS, sampling, settings.max_text_bytes)
    return (
        question or None,
        SamplingParameters.from_json(parameters) if parameters else SamplingParameters(),
    )


def parse_history(history: np.ndarray | None, settings: Settings) -> tuple[PastTurn, ...]:
    """Check a turn's `history`.

    Args:
        history: object [1] holding bytes; None or an empty string: nothing was said before.
        settings: limits.

    Raises:
        SessionError: INVALID_ARG.
    """
    text = _string(HISTORY, history, settings.max_text_bytes)
    return history_from_json(text) if text else ()


def parse_positions(positions: np.ndarray | None, settings: Settings) -> Positions:
    """Check a turn's `image_positions` by themselves.

    Args:
        positions: object [1] holding bytes; None or an empty string: none are given.
        settings: limits.

    Raises:
        SessionError: INVALID_ARG.
    """
    text = _string(IMAGE_POSITIONS, positions, settings.max_text_bytes)
    return positions_from_json(text) if text else None


_TENANT_NAME = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def parse_tenant(parameters: Mapping[str, Any]) -> str:
    """The tenant that a request's parameters name; `NO_TENANT` where they name none.

    Raises:
        SessionError: INVALID_ARG. An empty name is none either: it would be everybody's who forgot
            to fill it in.
    """
    if TENANT not in parameters:
        return NO_TENANT
    tenant = parameters[TENANT]
    if not isinstance(tenant, str) or not _TENANT_NAME.fullmatch(tenant):
        shown = ascii(tenant)
        raise invalid(
            f"the tenant is {shown if len(shown) <= 80 else f'{shown[:77]}...'}; it must be a text "
            "of 1 to 128 letters (A to Z), digits and . _ : @ / + = -"
        )
    return tenant


def image_items(
    image: np.ndarray | None, settings: Settings, spec: TensorSpec = IMAGE
) -> list[bytes]:
    """The elements of a turn's `image`, or of its `video`.

    Args:
        image: object [N] holding bytes; None, N = 0 or one empty string: no picture.
        settings: limits.
        spec: which of the two.

    Raises:
        SessionError: INVALID_ARG, the array has another shape, or too many elements or bytes.
    """
    if image is None or image.size == 0:
        return []
    name, pictures = spec.name, "pictures" if spec is IMAGE else "files"
    if image.ndim != 1:
        raise invalid(
            f"{name} has the shape {list(image.shape)}; it must be [number of {pictures}]", name
        )
    limit = settings.max_images_per_turn
    if image.size > limit:
        raise invalid(
            f"{name} holds {image.size} {pictures}; a turn takes at most {limit}: send the others "
            "in later turns",
            name,
        )
    items = [_bytes(item) for item in image]
    size = sum(map(len, items))
    if size > settings.max_images_bytes_per_turn:
        raise invalid(
            f"{name} holds {len(items)} {pictures} of {size} bytes together; the limit is "
            f"{settings.max_images_bytes_per_turn}: send some of them in later turns",
            name,
        )
    return [] if items == [b""] else items


def _string(spec: TensorSpec, array: np.ndarray | None, max_bytes: int) -> str:
    name = spec.name
    if array is None:
        return ""
    if array.shape != (1,):
        raise invalid(f"{name} has the shape {list(array.shape)}; it must be [1], one string", name)
    data = _bytes(array[0])
    if len(data) > max_bytes:
        raise invalid(
            f"{name} is {len(data)} bytes long; the limit is {max_bytes}: shorten it", name
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(
            f"{name} is not UTF-8: its byte {error.start} is 0x{data[error.start]:02x}, which "
            f"makes no character there ({error.reason}); encode the text as UTF-8",
            name,
        ) from None


def _bytes(item: Any) -> bytes:
    """An element of a BYTES tensor; one that was made from str is UTF-8."""
    return item.encode() if isinstance(item, str) else bytes(item)
