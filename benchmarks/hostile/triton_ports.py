"""What anybody can do who reaches Triton's own ports.

Two known holes of Triton 2.51's are not played, because only something in front of it can close
them: a chunked body of hundreds of thousands of chunks, and gzip that becomes gigabytes.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.hostile.attack import Play, UnsafeError, attack, post, side_by_side
from benchmarks.stand import Stand
from llava_triton.contract.errors import error_from_text

REFUSED = "INVALID_ARG|NOT_FOUND|UNAVAILABLE|INTERNAL"
HUGE = ([0, 2**32, 2**32], [0, 2**31, 2**31], [1, 2**40, 2**40], [2**62, 0, 4], [0, 1, 2**62])
INNER = ("language_model", "answer_collector")


def _inferred(stand: Stand, model: str, inputs: dict[str, tuple[str, list[int], bytes]]) -> Any:
    """The first response of a model, over a stream: the raw message."""
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["sequence_id"].string_param = uuid.uuid4().hex
    request.parameters["sequence_start"].bool_param = True
    request.parameters["sequence_end"].bool_param = True
    for name, (datatype, shape, data) in inputs.items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(data)
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(stand.server.grpc_address, options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return next(stub.ModelStreamInfer(iter([request]), timeout=30.0))


def _asked(stand: Stand, model: str, inputs: dict[str, tuple[str, list[int], bytes]]) -> str:
    try:
        response = _inferred(stand, model, inputs)
    except (grpc.RpcError, StopIteration) as error:
        return error_from_text(str(error)).code.name
    told = response.error_message
    return error_from_text(told).code.name if told else "OK"


def _string(text: bytes) -> tuple[str, list[int], bytes]:
    return "BYTES", [1], len(text).to_bytes(4, "little") + text


@attack("T1", right=REFUSED, cheap=True)
def impossible_features(stand: Stand) -> Play:
    """Inner models asked with features of impossible shapes."""
    return lambda: Counter(
        _asked(
            stand,
            model,
            {"text_input": _string(b"What?"), "image_features": ("FP32", shape, b"")},
        )
        for model in INNER
        for shape in HUGE
    )


@attack("T1b", right=REFUSED, cheap=True)
def features_of_nothing(stand: Stand) -> Play:
    """Inner models asked with features that are no numbers, and with made-up turn IDs."""
    picture = (Path("examples/pictures/dark.png")).read_bytes()

    def play() -> Counter[str]:
        answered: Counter[str] = Counter()
        encoded = None
        try:
            encoded = _inferred(stand, "image_encoder", {"image": _string(picture)})
        except (grpc.RpcError, StopIteration) as error:
            answered[error_from_text(str(error)).code.name] += 1
        outputs = encoded.infer_response.outputs if encoded else []
        for features in outputs:
            shape = list(features.shape)
            for value in (np.nan, np.inf, -np.inf):
                data = np.full(shape, value, dtype=np.float32).tobytes()
                inputs = {"text_input": _string(b"?"), "image_features": ("FP32", shape, data)}
                for model in INNER:
                    answered[_asked(stand, model, inputs)] += 1
        pixels = ("FP32", [1, 3, 2**20, 2**20], b"")
        answered[_asked(stand, "vision_encoder", {"pixel_values": pixels})] += 1
        return answered

    return play


@attack("T3", right=r"4\d\d|501|503", cheap=True)
def shared_memory(stand: Stand) -> Play:
    """The models' own shared memory registered as a client's."""
    port = stand.server.ports["http"]

    def play() -> Counter[str]:
        answered: Counter[str] = Counter()
        for number, region in enumerate(sorted(Path("/dev/shm").glob("llava-triton-server-*"))[:4]):
            name = f"/v2/systemsharedmemory/region/mine{number}"
            body = {"key": f"/{region.name}", "offset": 0, "byte_size": 64}
            status, _ = post(port, f"{name}/register", json.dumps(body).encode(), {})
            answered[status] += 1
            if status == "200":
                post(port, f"{name}/unregister", b"", {})
        status, _ = post(port, "/v2/systemsharedmemory/status", None, {}, "GET")
        answered[status] += 1
        return answered

    return play


@attack("T5", right=r"4\d\d|501|503", cheap=True)
def control(stand: Stand) -> Play:
    """The log, the traces and the repository in a client's hands."""
    port = stand.server.ports["http"]
    asked = [
        ("POST", "/v2/logging", b'{"log_verbose_level": 0}'),
        ("GET", "/v2/logging", None),
        ("GET", "/v2/trace/setting", None),
        ("POST", "/v2/trace/setting", b'{"trace_level": ["OFF"]}'),
        ("POST", "/v2/repository/index", b"{}"),
        ("POST", "/v2/repository/models/disconnect_watch/unload", b"{}"),
    ]
    return lambda: Counter(post(port, path, body, {}, how)[0] for how, path, body in asked)


@attack("T6", right=r"[45]\d\d|OK", cheap=True)
def odd_names(stand: Stand) -> Play:
    """Sequence IDs that are no names: control characters, 100,000 of them, numbers out of range.

    Triton refuses most by itself, with statuses of its own.
    """
    port = stand.server.ports["http"]
    ids: list[Any] = ["\0", "\n\r", "a" * 100_000, -1, 2**64, 1.5, {}, "../../x", "\u202e"]

    def call(session: Any) -> str:
        body: dict[str, Any] = {
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hello"]},
                {
                    "name": "sampling_parameters",
                    "datatype": "BYTES",
                    "shape": [1],
                    "data": ['{"max_tokens": 1}'],
                },
            ],
            "parameters": {
                "sequence_id": session,
                "sequence_start": True,
                "sequence_end": True,
            },
        }
        status, answer = post(port, "/v2/models/llava/infer", json.dumps(body).encode(), {})
        if status == "500" and b"INTERNAL" in answer:
            raise UnsafeError(answer.decode(errors="replace")[:200])
        return "OK" if status == "200" else status

    return lambda: side_by_side([partial(call, each) for each in ids])
