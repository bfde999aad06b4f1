"""The one table of what models take and give.

A new output of answers is a field of `Delta`; a new input is a line of `INPUTS`. Then run
`python -m llava_triton.contract`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_triton.contract.answers import ANSWER
from llava_triton.contract.tensors import TensorSpec

# What clients send.
TEXT_INPUT = TensorSpec("text_input", "BYTES", optional=True)
"""The user's message, UTF-8."""
IMAGE = TensorSpec("image", "BYTES", (-1,), optional=True)
"""Pictures, each an encoded file, as it is or in base64 or as a data URI. A video may stand among
them: a file of MP4, MOV, WebM or Matroska, or any element that begins with `VIDEO_MARK`."""
VIDEO = TensorSpec("video", "BYTES", (-1,), optional=True)
"""Videos, shown behind the pictures of `image`: each an encoded file, in the same forms. Where all
elements are picture files other than GIF, they are the frames of one video, in order."""
VIDEO_MARK = b"data:video/"
"""What tells a video from a picture: an element `data:video/TYPE;num_frames=N;base64,...` is a
video, of which N frames are shown. Without `;base64` the file itself follows the comma, as it is;
`;num_frames=N` may be left out. `data:video/jpeg;base64,A,B,C` holds the frames themselves, each in
base64."""
IMAGE_POSITIONS = TensorSpec("image_positions", "BYTES", optional=True)
"""A JSON list of integers, see `contract.positions`: of all that is in `image`, then in `video`."""
SAMPLING_PARAMETERS = TensorSpec("sampling_parameters", "BYTES", optional=True)
"""A JSON object, see `SamplingParameters`."""
HISTORY = TensorSpec("history", "BYTES", optional=True)
"""A JSON list, see `PastTurn`; only where a session opens."""
INPUTS = (TEXT_INPUT, IMAGE, VIDEO, IMAGE_POSITIONS, SAMPLING_PARAMETERS, HISTORY)
TEXTS = tuple(spec for spec in INPUTS if not spec.is_list)
"""Those of one string."""

# What the models tell one another.
PIXEL_VALUES = TensorSpec("pixel_values", "FP32", (3, -1, -1))
"""[N, 3, H, W]; the export fills in H and W."""
ENCODED = TensorSpec("image_features", "FP32", (-1, -1))
"""[N, T, D]; the export fills in T and D."""
IMAGE_FEATURES = TensorSpec("image_features", "UINT8", (-1,), optional=True)
"""[4 R D], the bytes of the rows of all the turn's pictures, one picture behind another; none where
it has no picture. Triton 2.51 multiplies the dimensions of a client's tensor without looking for an
overflow, so [2**53, 36, 128] of FP32 passes for no bytes, and the process that makes an array of it
dies. A shape of one dimension and one byte cannot overflow."""
IMAGE_LENGTHS = TensorSpec("image_lengths", "UINT8", (-1,), optional=True)
"""[4 N]: how many of the rows are each picture's, INT32 as bytes for the same reason."""
ENCODED_PICTURES = (IMAGE_FEATURES, IMAGE_LENGTHS)
"""What image_encoder hands on in place of pictures."""
TURN_ID = TensorSpec("turn_id", "BYTES")
"""Of each piece: names the turn to disconnect_watch; empty where there is nothing to look after."""
TURN_WATCHED = TensorSpec("turn_watched", "BOOL")
"""Never sent."""


@dataclass(frozen=True)
class Model:
    """What one model takes and gives, or one ensemble."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


_TURN = (TEXT_INPUT, *ENCODED_PICTURES, IMAGE_POSITIONS, SAMPLING_PARAMETERS, HISTORY)

MODELS = {
    "llava": Model(INPUTS, ANSWER.outputs),
    "llava_stream": Model(INPUTS, (*ANSWER.outputs, TURN_WATCHED)),
    "image_encoder": Model((IMAGE, VIDEO), ENCODED_PICTURES),
    "vision_encoder": Model((PIXEL_VALUES,), (ENCODED,)),
    "language_model": Model(_TURN, (*ANSWER.outputs, TURN_ID)),
    "answer_collector": Model(_TURN, ANSWER.outputs),
    "disconnect_watch": Model((TURN_ID,), (TURN_WATCHED,)),
}
