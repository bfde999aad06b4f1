"""A session over HTTP with nothing but tritonclient.

    python examples/http_unary.py [localhost:8000] [picture]

The picture is sent once; the later questions travel alone. A session is a Triton sequence: the
same sequence ID in every request, `sequence_start` in the first, `sequence_end` in the last.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import numpy as np
import tritonclient.http as triton

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*.*"))


def string_input(name: str, value: str | bytes) -> triton.InferInput:
    """An input tensor that holds one string or one file."""
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
    return tensor


def main(address: str = "localhost:8000", picture: str = str(PICTURES[0])) -> None:
    """Ask three questions about a picture."""
    client = triton.InferenceServerClient(address, network_timeout=600.0)
    session = f"example-{uuid.uuid4()}"  # whoever knows the ID can use the session: no guessing

    # 1. Open the session on a picture file, as it is on the disk, and ask.
    # 2. Ask on. `it` is clear from the first turn; only this text travels.
    # 3. Say how to answer, and end the session: the server frees all that it held.
    image = string_input("image", Path(picture).read_bytes())
    sampling = string_input("sampling_parameters", '{"max_tokens": 32, "temperature": 0}')
    turns = [
        ("Describe the picture.", [image], {"sequence_start": True}),
        ("What colour is it?", [], {}),
        ("How many shapes are there?", [sampling], {"sequence_end": True}),
    ]
    for question, more_inputs, flags in turns:
        inputs = [string_input("text_input", question), *more_inputs]
        result = client.infer("llava", inputs, sequence_id=session, **flags)
        answer = result.as_numpy("text_output")[0].decode()
        reused = result.as_numpy("num_cached_tokens")[0]
        prompt = result.as_numpy("num_input_tokens")[0]
        print(f"{question}\n  {answer}\n  ({reused} of {prompt} prompt tokens reused)")


if __name__ == "__main__":
    main(*sys.argv[1:])
