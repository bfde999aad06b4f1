"""A session over gRPC with nothing but tritonclient, the answers piece by piece.

    python examples/grpc_streaming.py [localhost:8001] [picture]

Streams go through the model `llava_stream`. Every response carries the new text; the last one of
an answer is the one with a finish reason.
"""

from __future__ import annotations

import queue
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*.*"))


def string_input(name: str, value: str | bytes) -> triton.InferInput:
    """An input tensor that holds one string or one file."""
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
    return tensor


def answer(responses: queue.Queue[tuple[Any, Any]]) -> Iterator[str]:
    """The pieces of the answer that is on its way."""
    while True:
        result, error = responses.get()
        if error is not None:
            raise error
        yield result.as_numpy("text_output")[0].decode()
        if result.as_numpy("finish_reason")[0]:
            return


def main(address: str = "localhost:8001", picture: str = str(PICTURES[0])) -> None:
    """Ask three questions about a picture over one gRPC stream."""
    session = f"example-{uuid.uuid4()}"
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    image = string_input("image", Path(picture).read_bytes())
    turns = [
        ("Describe the picture.", [image], {"sequence_start": True}),
        ("What colour is it?", [], {}),
        ("How many shapes are there?", [], {"sequence_end": True}),
    ]
    with triton.InferenceServerClient(address) as client:
        # tritonclient calls this from a thread of its own for every response.
        client.start_stream(lambda result, error: responses.put((result, error)))
        for question, more_inputs, flags in turns:
            inputs = [string_input("text_input", question), *more_inputs]
            client.async_stream_infer("llava_stream", inputs, sequence_id=session, **flags)
            print(question, end="\n  ")
            for piece in answer(responses):
                print(piece, end="", flush=True)
            print()
        # Leaving in the middle of an answer? stop_stream(cancel_requests=True) stops it.
        client.stop_stream()


if __name__ == "__main__":
    main(*sys.argv[1:])
