"""Shapes and sizes that no client sends, to every input of every model: none of them harms it."""

from __future__ import annotations

import http.client
import json
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llava_triton.server.triton_server import TritonServer, free_ports
from tests.server.test_bad_input import LIMIT, PICTURES
from tests.triton import WAIT_SECONDS, Stream, whole

SIDE = 96
"""The demo checkpoint's."""
HUGE = (2**31, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1)
ONE_DIMENSION = [[0], [3], *([each] for each in HUGE)]
PRODUCTS = [[0, 2**32, 2**32], [0, 2**31, 2**31], [1, 2**40, 2**40], [2**53, 36, 128], [0, 0, 0]]
TEXT = [[0], [2], [1, 1], *([each] for each in HUGE)]
BATCHES = [[each, 3, SIDE, SIDE] for each in (0, 9, *HUGE)] + [[1, 3, 2**31, 2**31], [0, 0, 0, 0]]
STREAMING = ("llava_stream", "language_model")
SHAPES: dict[tuple[str, str, str], list[list[int]]] = {
    ("image_encoder", "image", "BYTES"): ONE_DIMENSION,
    ("vision_encoder", "pixel_values", "FP32"): BATCHES,
    ("disconnect_watch", "turn_id", "BYTES"): TEXT,
    **{(model, "image", "BYTES"): [*ONE_DIMENSION, [1, 1]] for model in ("llava", "llava_stream")},
    **{
        (model, name, "BYTES"): TEXT
        for model in ("llava", "llava_stream", "answer_collector", "language_model")
        for name in ("text_input", "sampling_parameters", "history")
    },
    **{
        (model, name, kind): [*ONE_DIMENSION, *PRODUCTS]
        for model in ("answer_collector", "language_model")
        for name in ("image_features", "image_lengths")
        for kind in ("UINT8", "FP32")
    },
}


@dataclass(frozen=True)
class Tensor:
    """What a client says it sends, and what it sends."""

    model: str
    name: str
    kind: str
    shape: list[int]
    data: bytes


BESIDE = {
    "image_features": ("image_lengths", struct.pack("<I", 36)),
    "image_lengths": ("image_features", bytes(4 * 36 * 128)),
}
"""What comes with a tensor that is refused alone: one picture's."""


def tensors(negative: bool) -> Iterator[Tensor]:
    for (model, name, kind), shapes in SHAPES.items():
        backwards = [[-each for each in shape] for shape in shapes] if negative else []
        for shape in [*shapes, *backwards]:
            for data in (b"", struct.pack("<I", 2) + b"ab"):
                yield Tensor(model, name, kind, shape, data)


@pytest.fixture(scope="module")
def victim(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server that may come to harm."""
    log = tmp_path_factory.mktemp("wild shapes") / "triton.log"
    with TritonServer(demo_repository, *free_ports(3), log=log) as server:
        yield server


@pytest.fixture
def unharmed(victim: TritonServer) -> Iterator[TritonServer]:
    """What happens to it kills none of its processes, and it still answers."""
    before = victim.stubs()
    yield victim
    assert victim.alive
    assert victim.stubs() == before
    session = uuid.uuid4().hex
    picture = [PICTURES[0].read_bytes()]
    with Stream(victim.grpc_address) as stream:
        said = {"session": session, "parameters": LIMIT}
        first = whole(stream.turn("Describe it.", images=picture, start=True, **said))
        second = whole(stream.turn("And how many shapes?", end=True, **said))
    assert first.num_output_tokens > 0
    assert second.num_cached_tokens > 0


def over_grpc(server: TritonServer, sent: list[Tensor]) -> list[str]:
    """Send each tensor, alone if need not be, as a session's only turn; errors, or empty texts."""

    def request(tensor: Tensor) -> Any:
        made = service_pb2.ModelInferRequest(model_name=tensor.model)
        made.parameters["sequence_id"].string_param = uuid.uuid4().hex
        for flag in ("sequence_start", "sequence_end"):
            made.parameters[flag].bool_param = True
        made.inputs.add(name=tensor.name, datatype=tensor.kind, shape=tensor.shape)
        made.raw_input_contents.append(tensor.data)
        if tensor.name in BESIDE:
            name, data = BESIDE[tensor.name]
            made.inputs.add(name=name, datatype="UINT8", shape=[len(data)])
            made.raw_input_contents.append(data)
        return made

    told = []
    with grpc.insecure_channel(server.grpc_address) as channel:
        triton = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for tensor in sent:
            if tensor.model in STREAMING:
                responses = triton.ModelStreamInfer(iter([request(tensor)]), timeout=WAIT_SECONDS)
                told.append("".join(response.error_message for response in responses))
                continue
            try:
                triton.ModelInfer(request(tensor), timeout=WAIT_SECONDS)
                told.append("")
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                told.append(str(error.details()))
    return told


def test_over_grpc(unharmed: TritonServer) -> None:
    over_grpc(unharmed, list(tensors(negative=True)))


def test_over_http_in_binary(unharmed: TritonServer) -> None:
    for tensor in tensors(negative=False):
        said = {
            "name": tensor.name,
            "datatype": tensor.kind,
            "shape": tensor.shape,
            "parameters": {"binary_data_size": len(tensor.data)},
        }
        assert ask(unharmed, tensor.model, said, tensor.data) in (200, 400, 500, 501)


def test_over_http_in_json(unharmed: TritonServer) -> None:
    """Of strings only. Triton's HTTP server takes the memory that a shape of numbers promises
    before it looks at anything, and dies of [2**40]: nothing behind it can help."""
    for tensor in tensors(negative=False):
        if tensor.kind != "BYTES":
            continue
        for data in ([], ["ab"]):
            said = {"name": tensor.name, "datatype": "BYTES", "shape": tensor.shape, "data": data}
            assert ask(unharmed, tensor.model, said) in (200, 400, 500, 501)


def ask(server: TritonServer, model: str, tensor: dict[str, Any], data: bytes = b"") -> int:
    """One request over HTTP; its status."""
    named = {"sequence_id": uuid.uuid4().hex, "sequence_start": True, "sequence_end": True}
    header = json.dumps({"inputs": [tensor], "parameters": named}).encode()
    host, _, port = server.http_address.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.request(
            "POST",
            f"/v2/models/{model}/infer",
            header + data,
            {"Inference-Header-Content-Length": str(len(header))} if data else {},
        )
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("size", [0, 1, 4 * 36 * 128 - 1, 9 * 4 * 36 * 128])
def test_features_of_another_size_are_refused_in_a_sentence(
    unharmed: TritonServer, size: int
) -> None:
    tensor = Tensor("language_model", "image_features", "UINT8", [size], bytes(size))
    (error,) = over_grpc(unharmed, [tensor])
    assert f"image_features has {size} bytes; it takes 512 a token" in error
    assert "and image_lengths speaks of 36 tokens" in error
    assert "INVALID_ARG" in error


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        (b"\0\0\0", "image_lengths has 3 bytes; it takes 4 a picture"),
        (struct.pack("<2i", 36, 0), "image_lengths holds 2 numbers, the least 0"),
        (struct.pack("<2i", 37, -1), "image_lengths holds 2 numbers, the least -1"),
        (struct.pack("<65i", *[4] * 65), "image_lengths holds 65 numbers, the least 4"),
        (struct.pack("<2i", 30, 7), "image_lengths speaks of 37 tokens"),
        (b"", "image_lengths speaks of 0 tokens"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_in_a_sentence(
    unharmed: TritonServer, lengths: bytes, told: str
) -> None:
    tensor = Tensor("language_model", "image_lengths", "UINT8", [len(lengths)], lengths)
    (error,) = over_grpc(unharmed, [tensor])
    assert told in error
    assert "INVALID_ARG" in error
