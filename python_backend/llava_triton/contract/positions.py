"""Where pictures stand in a text: before which of its characters.

Numbers beside the text, not marks inside of it: so no text that a user writes can move a picture.
"""

from __future__ import annotations

import json
from typing import Any

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import IMAGE_POSITIONS

Positions = tuple[int, ...] | None
"""Of each picture: how many of the text's characters are before it. None: all pictures are before
the text, as the checkpoint's chat template puts them."""


def positions_from_json(text: str) -> tuple[int, ...]:
    """Read the JSON list of the input `image_positions`.

    Raises:
        SessionError: INVALID_ARG, it is no list of positions.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not valid JSON ({error})") from None
    fault = positions_fault(value)
    if fault is not None:
        raise _invalid(fault)
    return tuple(value)


def positions_fault(value: Any) -> str | None:
    """Why a JSON value is no list of positions; None: it is one."""
    if not isinstance(value, list):
        return "is no list"
    if not all(type(each) is int and each >= 0 for each in value):
        return "holds something other than whole numbers of at least 0"
    if value != sorted(value):
        return "is not in ascending order"
    return None


def check_positions(positions: Positions, text: str | None, images: int) -> None:
    """Compare positions with the turn that they are of.

    Args:
        positions: as they were sent.
        text: of the turn; None: it has none.
        images: pictures that come with it.

    Raises:
        SessionError: INVALID_ARG, they do not fit it.
    """
    if positions is None:
        return
    if len(positions) != images:
        raise _invalid(f"has {len(positions)} numbers and the turn has {images} pictures")
    length = len(text or "")
    if positions and positions[-1] > length:
        raise _invalid(f"names position {positions[-1]} and text_input has {length} characters")


def _invalid(fault: str) -> SessionError:
    return invalid(
        f"image_positions {fault}; give a list with a number for each picture of the turn: how "
        "many characters of text_input are before it, such as [0, 12]",
        IMAGE_POSITIONS.name,
    )
