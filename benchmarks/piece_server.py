"""A stand-in for Triton that streams pieces at a steady rate, in a process of its own.

The text of each piece is the time at which it was sent, and a space: by `time.monotonic`, which all
processes of a machine share.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta, FinishReason

PIECES = 200
SECONDS_BETWEEN = 0.02


class PieceServer:
    """The process, while the context lasts."""

    address: str

    def __enter__(self) -> PieceServer:
        command = [sys.executable, "-m", "benchmarks.piece_server"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{self._process.stdout.readline().strip()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        for request in requests:
            asks = any(tensor.name == "text_input" for tensor in request.inputs)
            shows = any(tensor.name == "image" for tensor in request.inputs)
            for number in range(PIECES if asks and not shows else 1, 0, -1):
                yield _piece(request.id, "" if number > 1 else "stop")
                if number > 1:
                    time.sleep(SECONDS_BETWEEN)


def _piece(request_id: str, reason: FinishReason) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.id = request_id
    piece = Delta(f"{time.monotonic():.6f} ", reason, 0, 0, 0, 0.0)
    for name, value in ANSWER.to_raw(piece).items():
        response.infer_response.outputs.add().name = name
        response.infer_response.raw_output_contents.append(value)
    return response


def _serve() -> None:
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(64), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    _serve()
