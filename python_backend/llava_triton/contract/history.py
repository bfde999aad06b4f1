"""Earlier turns of a conversation, as a client tells them when it opens a session with them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import HISTORY
from llava_triton.contract.positions import Positions, positions_fault


@dataclass(frozen=True)
class PastTurn:
    """One turn that took place before: in a session that is lost, or anywhere else."""

    text: str
    """What the user said; never empty."""
    answer: str
    images: int = 0
    """How many pictures came with it. They themselves lie in the input `image`: those of all past
    turns, in order, then those of the new turn."""
    image_positions: Positions = None
    """Where they stand in the text. Of fewer than all it says where the last ones do; the others
    are before the text, as pictures that came earlier, without a question."""


def history_to_json(turns: list[PastTurn]) -> str:
    """The input `history`, see `history_from_json`."""
    return json.dumps(
        [
            {name: value for name, value in asdict(turn).items() if value is not None}
            for turn in turns
        ]
    )


def history_from_json(text: str) -> tuple[PastTurn, ...]:
    """Read the JSON list of the input `history`.

    Raises:
        SessionError: INVALID_ARG, it is no JSON list of past turns.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"is not valid JSON ({error})") from None
    if not isinstance(values, list):
        raise _invalid("is no JSON list")
    return tuple(_past_turn(number, value) for number, value in enumerate(values, 1))


def _past_turn(number: int, value: Any) -> PastTurn:
    names = [field.name for field in fields(PastTurn)]
    if not isinstance(value, dict) or not set(value) <= set(names):
        raise _invalid(f"has a turn {number} that is no object of {', '.join(names)}")
    text, answer, images = value.get("text"), value.get("answer"), value.get("images", 0)
    if not isinstance(text, str) or not text:
        raise _invalid(f"has a turn {number} without a text")
    if not isinstance(answer, str):
        raise _invalid(f"has a turn {number} without an answer")
    if _has_half_characters(text + answer):
        raise _invalid(f"has a turn {number} with half of a surrogate pair")
    if not isinstance(images, int) or isinstance(images, bool) or images < 0:
        raise _invalid(f"has a turn {number} whose number of images is none")
    positions = value.get("image_positions")
    if positions is not None:
        fault = positions_fault(positions)
        if fault is not None:
            raise _invalid(f"has a turn {number} whose image_positions {fault}")
        if len(positions) > images or (positions and positions[-1] > len(text)):
            raise _invalid(f"has a turn {number} whose image_positions do not fit it")
        positions = tuple(positions)
    return PastTurn(text, answer, images, positions)


def _has_half_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _invalid(fault: str) -> SessionError:
    return invalid(
        f'history {fault}; give a list like [{{"text": "What is it?", "answer": "A cat.", '
        '"images": 1}]',
        HISTORY.name,
    )
