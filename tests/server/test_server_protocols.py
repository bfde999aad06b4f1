"""Which of Triton's protocols are open, through both doors: every one is tried."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2

from llava_triton.server.server_guard import shared_memory
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.server_command import Family

REGION: dict[str, Any] = {"key": "/region", "offset": 0, "byte_size": 4}
CUDA = {"raw_handle": {"b64": "AA=="}, "device_id": 0, "byte_size": 4}
CLOSED = [
    ("POST", "/v2/repository/index", {}),
    ("POST", "/v2/repository/models/llava/load", {}),
    ("POST", "/v2/repository/models/llava/unload", {}),
    ("GET", "/v2/logging", None),
    ("POST", "/v2/logging", {"log_info": True}),
    ("GET", "/v2/trace/setting", None),
    ("POST", "/v2/trace/setting", {"trace_rate": "1000"}),
    ("GET", "/v2/models/llava/trace/setting", None),
    ("POST", "/v2/models/llava/trace/setting", {"trace_rate": "1000"}),
    *(("GET", f"/v2/{kind}sharedmemory/status", None) for kind in ("system", "cuda")),
    *(("GET", f"/v2/{kind}sharedmemory/region/r/status", None) for kind in ("system", "cuda")),
    ("POST", "/v2/systemsharedmemory/region/r/register", REGION),
    ("POST", "/v2/cudasharedmemory/region/r/register", CUDA),
    *(("POST", f"/v2/{kind}sharedmemory/unregister", {}) for kind in ("system", "cuda")),
    *(("POST", f"/v2/{kind}sharedmemory/region/r/unregister", {}) for kind in ("system", "cuda")),
]
OPEN = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/llava",
    "/v2/models/llava/ready",
    "/v2/models/llava/config",
    "/v2/models/llava/stats",
    "/v2/models/stats",
]
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
OPEN_METHODS = {
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
}


def ask_http(
    server: TritonServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60.0)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def ask_grpc(server: TritonServer, method: str) -> grpc.RpcError | None:
    """The error of an empty request, None where it is answered."""
    message = SERVICE.methods_by_name[method]
    stub = service_pb2.__dict__[message.input_type.name]()
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.stream_stream(
            f"/{SERVICE.full_name}/{method}",
            request_serializer=type(stub).SerializeToString,
            response_deserializer=service_pb2.__dict__[message.output_type.name].FromString,
        )
        try:
            list(call(iter([stub]), timeout=60.0))
        except grpc.RpcError as error:
            return error
    return None


@pytest.mark.parametrize(("method", "path", "body"), CLOSED)
def test_control_over_http_is_closed(
    server: TritonServer, method: str, path: str, body: Any
) -> None:
    status, text = ask_http(server, method, path, body)
    assert status == 403, text
    assert "restricted" in text


@pytest.mark.parametrize("method", sorted({*SERVICE.methods_by_name} - OPEN_METHODS))
def test_control_over_grpc_is_closed(server: TritonServer, method: str) -> None:
    error = ask_grpc(server, method)
    assert error is not None
    assert "restricted" in error.details()


@pytest.mark.parametrize("path", OPEN)
def test_what_clients_need_is_open_over_http(server: TritonServer, path: str) -> None:
    assert ask_http(server, "GET", path)[0] == 200


@pytest.mark.parametrize("method", sorted(OPEN_METHODS))
def test_what_clients_need_is_open_over_grpc(server: TritonServer, method: str) -> None:
    error = ask_grpc(server, method)
    assert error is None or "restricted" not in error.details()


def closing_headers(server: TritonServer) -> Iterator[tuple[str, str]]:
    """What every user of the machine can read: name and value of the headers that Triton wants."""
    for option in psutil.Process(server.pid).cmdline():
        if "-restricted-" in option:
            name, _, value = option.partition(":")[2].partition("=")
            yield name, value


def raw_http(server: TritonServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.ports["http"]), 60.0) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def raw_grpc(server: TritonServer, name: str, value: str) -> bytes:
    """The frames that answer LogSettings with a header that no library of gRPC would send."""

    def header(name: str, value: str) -> bytes:  # literal, not indexed, not compressed
        return b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in (name, value))

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
        )

    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{SERVICE.full_name}/LogSettings",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        name: value,
    }
    block = b"".join(header(*each) for each in headers.items())
    with socket.create_connection(("127.0.0.1", server.ports["grpc"]), 60.0) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(4, 0, 0, b"")
            + frame(1, 4, 1, block)
            + frame(0, 1, 1, bytes(5))
        )
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_who_reads_the_command_line_cannot_open_them(server: TritonServer) -> None:
    headers = list(closing_headers(server))
    assert len(headers) == 2
    for name, value in headers:
        assert len(value) > 40
        told = raw_http(
            server,
            f"GET /v2/logging HTTP/1.1\r\nHost: x\r\n{name}: {value}\r\n\r\n".encode(),
        )
        assert b"log_info" not in told
        for key in (name, name.lower()):
            told = raw_grpc(server, f"triton-grpc-protocol-{key}", value)
            assert b"grpc" in told  # it was understood
            assert b"log_info" not in told
    assert server.alive


def register(server: TritonServer, region: Path) -> int:
    path = "/v2/systemsharedmemory/region/r/register"
    return ask_http(server, "POST", path, {**REGION, "key": f"/{region.name}"})[0]


def test_what_passes_between_models_is_not_for_others(server: TritonServer) -> None:
    regions = shared_memory(Family(server.pid).name)
    assert len(regions) >= 5
    for region in regions:
        assert register(server, region) == 403
        assert region.stat().st_mode & 0o777 == 0o600  # nor for other users of this machine


def test_shared_memory_for_clients_is_a_setting(tmp_path: Path) -> None:
    model = tmp_path / "toy"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(
        'name: "toy" backend: "python" max_batch_size: 0 instance_group [ { kind: KIND_CPU } ] '
        'output [ { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] } ]'
    )
    (model / "1" / "model.py").write_text("class TritonPythonModel: pass")
    with (
        TritonServer(tmp_path, *free_ports(3), client_shared_memory=True) as server,
        tempfile.NamedTemporaryFile(dir="/dev/shm") as region,
    ):
        region.truncate(REGION["byte_size"])
        assert register(server, Path(region.name)) == 200
        assert ask_http(server, "GET", "/v2/logging")[0] == 403
