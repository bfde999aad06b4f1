"""A Triton without models, for tests of what stands in front: it knows sessions and echoes."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta, FinishReason
from llava_triton.server.triton_server import free_ports


@dataclass
class Seen:
    """A request as it arrived."""

    session: str
    start: bool
    end: bool
    inputs: dict[str, list[bytes]] = field(default_factory=dict)
    rewind: int | None = None
    """How many turns it keeps."""
    model: str = ""
    resume: bool = False
    fork: str = ""
    stop: str = ""
    """The session whose answer is to end."""
    tenant: str = ""

    @property
    def text(self) -> str:
        return self.inputs.get("text_input", [b""])[0].decode()


class StubTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers each turn with its text in two pieces, once `may_answer` is set; the second one once
    `may_end` is, too.

    Turns that name no open session are refused as Triton does it, and pictures that begin with
    `no picture` as the engine does.

    Args:
        journal: sessions that can be resumed; several stubs may share it. None: there is none.
        port: where it listens; by default a free one.
    """

    def __init__(self, journal: set[str] | None = None, port: int | None = None) -> None:
        self.seen: list[Seen] = []
        self.open: set[str] = set()
        self.tenants: dict[str, str] = {}
        """Of the sessions that were ever open."""
        self.is_full = False
        """Whether all turns are refused until later."""
        self.journal = journal
        self.calls_ended = 0
        """Calls that were cancelled, or whose channel was closed."""
        self.cancelled: list[tuple[str, str]] = []
        """Sessions and request IDs of the turns that were cancelled by requests."""
        self.knows_waiting = True
        """Whether such a request finds its turn."""
        self.may_answer, self.may_end = threading.Event(), threading.Event()
        self.may_answer.set()
        self.may_end.set()
        self._once = threading.Event()
        port = port or free_ports(1)[0]
        self.port = port
        self.grpc_address = f"127.0.0.1:{port}"
        self.ports = {"metrics": free_ports(1)[0]}
        self.metrics_address = f"127.0.0.1:{self.ports['metrics']}"
        self._server = grpc.server(
            ThreadPoolExecutor(100), options=[("grpc.max_receive_message_length", -1)]
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        assert self._server.add_insecure_port(self.grpc_address) == port
        self._server.start()

    def stop(self) -> None:
        self.may_answer.set()
        self.may_end.set()
        self._server.stop(0).wait()

    def go_on_once(self) -> None:
        """Let one turn be answered that waits."""
        self._once.set()

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        context.add_callback(self._count_ended)
        for request in requests:
            yield from self._answer(request)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        return list(self._answer(request))[-1].infer_response

    def _count_ended(self) -> None:
        self.calls_ended += 1

    def _answer(self, request: Any) -> Iterator[Any]:
        parameters = request.parameters
        if "cancel_answer" in parameters:
            cancelled = parameters["cancel_answer"], parameters["cancel_request"]
            self.cancelled.append((cancelled[0].string_param, cancelled[1].string_param))
            yield _piece(request.id, "", "stopped")
            return
        seen = Seen(
            parameters["sequence_id"].string_param,
            parameters["sequence_start"].bool_param,
            parameters["sequence_end"].bool_param,
            rewind=parameters["rewind"].int64_param if "rewind" in parameters else None,
            model=request.model_name,
            resume="resume" in parameters and parameters["resume"].bool_param,
            fork=parameters["fork"].string_param if "fork" in parameters else "",
            stop=parameters["stop_answer"].string_param if "stop_answer" in parameters else "",
            tenant=parameters["tenant"].string_param if "tenant" in parameters else "",
        )
        for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True):
            seen.inputs[tensor.name] = list(_elements(data))
            assert list(tensor.shape) == [len(seen.inputs[tensor.name])]
        is_ping = seen.start and seen.end and not seen.inputs and not seen.stop
        if not is_ping:
            self.seen.append(seen)
            while not self.may_answer.wait(0.01):
                if self._once.is_set():
                    self._once.clear()
                    break
                if self._is_cancelled(seen, request):
                    yield _error(request.id, "CANCELLED: the turn was cancelled")
                    return
        refusal = self._refusal(seen)
        if refusal:
            yield _error(request.id, refusal)
            return
        yield _piece(request.id, seen.text[:1], "")
        while not self.may_end.wait(0.01):
            if self._is_cancelled(seen, request):
                yield _error(request.id, "CANCELLED: the turn was cancelled")
                return
        yield _piece(request.id, seen.text[1:], "stop")

    def _is_cancelled(self, seen: Seen, request: Any) -> bool:
        return self.knows_waiting and (seen.session, request.id) in self.cancelled

    def _refusal(self, seen: Seen) -> str:
        if self.is_full:
            return "UNAVAILABLE: 64 turns are waiting already"
        if self.tenants.get(seen.session, seen.tenant) != seen.tenant:
            return "NOT_FOUND: session ID is unknown or has expired"
        if seen.resume and seen.session not in self.open | (self.journal or set()):
            return "NOT_FOUND: session ID is unknown or has expired"
        if (seen.fork or seen.stop) and (seen.fork or seen.stop) not in self.open:
            return "NOT_FOUND: session ID is unknown or has expired"
        if not seen.start and seen.session not in self.open:
            return "inference request for sequence 1 must specify the START flag"
        if seen.resume:
            self.open.add(seen.session)  # also where its turn is refused
        if any(image.startswith(b"no picture") for image in seen.inputs.get("image", [])):
            return "INVALID_ARG: image 1 is no picture"
        if not seen.inputs and not seen.start and not seen.end:
            return "INVALID_ARG: the turn asks nothing"
        if seen.start:
            self.open.add(seen.session)
            self.tenants[seen.session] = seen.tenant
            if self.journal is not None:
                self.journal.add(seen.session)
        if seen.end:
            self.open.discard(seen.session)
            if self.journal is not None:
                self.journal.discard(seen.session)
        return ""


def _elements(data: bytes) -> Iterator[bytes]:
    while data:
        (size,) = struct.unpack_from("<I", data)
        yield data[4 : 4 + size]
        data = data[4 + size :]


def _error(request_id: str, text: str) -> Any:
    response = service_pb2.ModelStreamInferResponse(error_message=text)
    response.infer_response.id = request_id
    return response


def _piece(request_id: str, text: str, reason: FinishReason) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.id = request_id
    raw = ANSWER.to_raw(Delta(text, reason, 1, 1, 1, 1.0))
    for spec in ANSWER.outputs:
        output = response.infer_response.outputs.add(name=spec.name, datatype=spec.datatype)
        output.shape.append(0 if spec.is_list else 1)
        response.infer_response.raw_output_contents.append(raw[spec.name])
    return response
