"""A session over gRPC with nothing but tritonclient, each answer at once.

    python examples/grpc_unary.py [localhost:8001] [picture]

The picture is sent, encoded and prefilled before the first question is asked, so that even the
first answer comes quickly.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*.*"))


def string_input(name: str, value: str | bytes) -> triton.InferInput:
    """An input tensor that holds one string or one file."""
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
    return tensor


def main(address: str = "localhost:8001", picture: str = str(PICTURES[0])) -> None:
    """Show a picture, ask two questions, end the session."""
    client = triton.InferenceServerClient(address)
    session = f"example-{uuid.uuid4()}"

    # An opening turn without text answers nothing; it only prepares.
    image = string_input("image", Path(picture).read_bytes())
    client.infer("llava", [image], sequence_id=session, sequence_start=True)

    for question in ("How many shapes are there?", "Describe the picture."):
        result = client.infer("llava", [string_input("text_input", question)], sequence_id=session)
        print(f"{question}\n  {result.as_numpy('text_output')[0].decode()}")

    # An ending turn without text only frees what the session held.
    client.infer("llava", [], sequence_id=session, sequence_end=True)

    try:
        client.infer("llava", [string_input("text_input", "Still there?")], sequence_id=session)
    except InferenceServerException as error:
        print(f"After the end: {error.message()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
