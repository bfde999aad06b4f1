"""The tensors of the models: their names, and their values to and from Python. Knows no Triton."""

from __future__ import annotations

import numpy as np

from llava_triton.delta import Delta
from llava_triton.errors import invalid
from llava_triton.sampling import SamplingParameters
from llava_triton.settings import Settings

TEXT_INPUT = "text_input"
IMAGE = "image"
SAMPLING_PARAMETERS = "sampling_parameters"
PIXEL_VALUES = "pixel_values"
IMAGE_FEATURES = "image_features"
TURN_ID = "turn_id"
TEXT_OUTPUT = "text_output"
FINISH_REASON = "finish_reason"
NUM_INPUT_TOKENS = "num_input_tokens"
NUM_OUTPUT_TOKENS = "num_output_tokens"
NUM_CACHED_TOKENS = "num_cached_tokens"
FIRST_TOKEN_MS = "first_token_ms"

ANSWER_OUTPUTS = (
    TEXT_OUTPUT,
    FINISH_REASON,
    NUM_INPUT_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_CACHED_TOKENS,
    FIRST_TOKEN_MS,
)
"""What `llava` and `llava_stream` answer with."""

CANCEL_TURN = "cancel_turn"
"""Request parameter, among the models: cancel the turn of this ID; nothing else is done."""
WHOLE_ANSWER = "whole_answer"
"""Request parameter, among the models: one response with the whole answer."""

NO_FEATURES = np.zeros((0, 1, 1), dtype=np.float32)
"""`image_features` of a turn without a picture."""


def parse_turn(
    text: np.ndarray | None, sampling: np.ndarray | None, settings: Settings
) -> tuple[str | None, SamplingParameters]:
    """A turn's text and sampling parameters.

    Args:
        text: `text_input`, BYTES [1]; None or an empty string: the turn has no text.
        sampling: `sampling_parameters`, BYTES [1], JSON; None or empty: the defaults.
        settings: limits.

    Raises:
        SessionError: INVALID_ARG: a wrong shape, not UTF-8, too long, or a bad parameter.
    """
    parameters = _string(SAMPLING_PARAMETERS, sampling, settings)
    return (
        _string(TEXT_INPUT, text, settings) or None,
        SamplingParameters.from_json(parameters) if parameters else SamplingParameters(),
    )


def image_items(image: np.ndarray | None, settings: Settings) -> list[bytes]:
    """The pictures of a turn, as they were sent.

    Args:
        image: `image`, BYTES [-1]; None, no elements or one empty element: no picture.
        settings: limits.

    Raises:
        SessionError: INVALID_ARG: too many pictures.
    """
    items = [] if image is None else [_bytes(item) for item in image.reshape(-1)]
    if items == [b""]:
        return []
    if len(items) > settings.max_images_per_turn:
        raise invalid(
            f"image holds {len(items)} pictures; a turn takes at most "
            f"{settings.max_images_per_turn}: send the others in later turns"
        )
    return items


def output_arrays(delta: Delta) -> dict[str, np.ndarray]:
    """A piece of an answer as the output tensors `ANSWER_OUTPUTS`, each of shape [1]."""
    return {
        TEXT_OUTPUT: np.array([delta.text.encode()], dtype=np.object_),
        FINISH_REASON: np.array([delta.finish_reason.encode()], dtype=np.object_),
        NUM_INPUT_TOKENS: np.array([delta.num_input_tokens], dtype=np.int32),
        NUM_OUTPUT_TOKENS: np.array([delta.num_output_tokens], dtype=np.int32),
        NUM_CACHED_TOKENS: np.array([delta.num_cached_tokens], dtype=np.int32),
        FIRST_TOKEN_MS: np.array([delta.first_token_ms], dtype=np.float32),
    }


def _string(name: str, array: np.ndarray | None, settings: Settings) -> str:
    if array is None or array.size == 0:
        return ""
    if array.size != 1:
        raise invalid(f"{name} has the shape {list(array.shape)}; it must hold one string, [1]")
    data = _bytes(array.reshape(-1)[0])
    if len(data) > settings.max_text_bytes:
        raise invalid(
            f"{name} is {len(data)} bytes long; the limit is {settings.max_text_bytes}: shorten it"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(
            f"{name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start} "
            f"({error.reason}); encode the text as UTF-8"
        ) from error


def _bytes(item: object) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode()
