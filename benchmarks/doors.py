"""The doors of a server: every way in which a client can ask it."""

from __future__ import annotations

import http.client
import json
import time
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from benchmarks.load import Answer, Ask, send
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.transport import Transport, session_error
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError, error_from_text
from llava_triton.server.triton_server import TritonServer

TRITON_PATH = "/v2/models/llava/infer"
ADAPTER_PATH = "/invocations"
BINARY = "application/vnd.sagemaker-triton.binary+json;json-header-size="
ANSWER_SECONDS = 300.0
LEAVE_SECONDS = 0.05
"""So long after its request a client goes that leaves a whole answer."""
SESSION = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"
KEPT_SECONDS = 2.0
"""A connection unused for longer is opened anew; uvicorn closes it after 5 s."""
_CODES = {
    "session_not_found": ErrorCode.NOT_FOUND,
    "unavailable": ErrorCode.UNAVAILABLE,
    "internal": ErrorCode.INTERNAL,
}
"""By the adapter's codes; the others say what is wrong with the request."""
_OUTPUTS = [tritonclient.http.InferRequestedOutput(spec.name, False) for spec in ANSWER.outputs]


class Leavable(Transport):
    """A transport whose whole answers can be left, too."""

    @abstractmethod
    def leave(self, turn: Ask) -> None:
        """Ask, and go away without the answer."""

    def cancel(self) -> None:
        """Break off what runs, from another thread."""
        self.close()

    @property
    def session(self) -> str | None:
        """The ID that the server gave the session opened last; None where clients choose IDs."""
        return None


class Grpc(GrpcTransport, Leavable):
    """Triton's gRPC; a deadline leaves a whole answer."""

    def leave(self, turn: Ask) -> None:
        """The deadline is shorter than the answer."""
        try:
            self._client.infer(
                "llava",
                turn.inputs(tritonclient.grpc),
                sequence_id=turn.session_id,
                sequence_start=turn.start,
                sequence_end=turn.end,
                client_timeout=LEAVE_SECONDS,
            )
        except InferenceServerException as error:
            if error.status() != "StatusCode.DEADLINE_EXCEEDED":
                raise session_error(error, "gRPC") from error

    def cancel(self) -> None:
        """The stream ends, and whoever waits for its pieces hears of it."""
        self._client.stop_stream(cancel_requests=True)


class Http(Leavable):
    """Triton's inference requests over a connection that stays: to Triton itself or the adapter.

    Args:
        port: of 127.0.0.1.
        path: `TRITON_PATH` or `ADAPTER_PATH`.
    """

    def __init__(self, port: int, path: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
        self._path = path
        self._used = 0.0
        self._session: str | None = None
        self._opened_as: int | str = 0
        """What its client calls that session."""

    @property
    def session(self) -> str | None:
        """See `Leavable`."""
        return self._session

    def ask(self, turn: Ask) -> Delta:
        """One request, one answer."""
        with self._told():
            body = self._send(turn, "application/json").read()
            if _only_closes(turn) and self._path == ADAPTER_PATH:
                return _CLOSED
            outputs = json.loads(body)["outputs"]
            return _delta({each["name"]: each["data"][0] for each in outputs if each["data"]})

    def stream(self, turn: Ask) -> Generator[Delta, None, None]:
        """Pieces as they come, of the adapter's."""
        if _only_closes(turn):
            yield self.ask(turn)
            return
        ended = False
        try:
            with self._told():
                answer = self._send(turn, "text/event-stream")
                while line := answer.readline():
                    if line.startswith(b"data: "):
                        values = json.loads(line[6:])
                        if "error" in values:
                            raise _adapter_error(values["error"])
                        delta = _delta(values)
                        ended = delta.is_final
                        yield delta
        finally:
            if not ended:
                self._connection.close()

    def leave(self, turn: Ask) -> None:
        """Close the connection in the middle of an answer."""
        with self._told():
            self._request(turn, "application/json")
            time.sleep(LEAVE_SECONDS)
            self._connection.close()

    def close(self) -> None:
        """Let the connection go."""
        self._connection.close()

    def _send(self, turn: Ask, accept: str) -> http.client.HTTPResponse:
        self._request(turn, accept)
        answer = self._connection.getresponse()
        if answer.status != 200:
            told = json.loads(answer.read())["error"]
            raise error_from_text(told) if isinstance(told, str) else _adapter_error(told)
        self._session = answer.headers.get(NEW_SESSION, "").partition(";")[0] or self._session
        return answer

    def _request(self, turn: Ask, accept: str) -> None:
        if time.monotonic() > self._used + KEPT_SECONDS:
            self._connection.close()  # the next request opens it
        self._used = time.monotonic()
        body, size = tritonclient.http.InferenceServerClient.generate_request_body(
            turn.inputs(tritonclient.http),
            outputs=_OUTPUTS,
            sequence_id=turn.session_id,
            sequence_start=turn.start,
            sequence_end=turn.end,
        )
        headers = {"Accept": accept, "Content-Type": "application/json"}
        if self._path == ADAPTER_PATH:
            headers |= self._adapter_session(turn)
            if _only_closes(turn):
                body, size = b'{"requestType": "CLOSE"}', None
            if size is not None:
                headers["Content-Type"] = f"{BINARY}{size}"
        elif size is not None:
            headers["Inference-Header-Content-Length"] = str(size)
        self._connection.request("POST", self._path, body, headers)

    def _adapter_session(self, turn: Ask) -> dict[str, str]:
        if turn.start and turn.end:
            return {}  # an answer without a session
        if turn.start:
            self._opened_as = turn.session_id
            return {SESSION: "NEW_SESSION"}
        known = self._session if turn.session_id == self._opened_as else None
        return {SESSION: known or str(turn.session_id)}

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong, as a SessionError."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise session_error(error, f"port {self._connection.port}") from error


@dataclass(frozen=True)
class Door:
    """One way in."""

    name: str
    side: str
    """`triton` or `adapter`: a session stays on the side where it was opened."""
    streamed: bool
    connect: Callable[[], Leavable]

    @property
    def cancels(self) -> bool:
        """Whether a client that leaves stops its answer. (Triton's whole answers go on.)"""
        return self.streamed or self.side == "adapter"


class Connection:
    """One client's connection through a door. Its methods raise SessionError."""

    def __init__(self, door: Door) -> None:
        self._streamed = door.streamed
        self._transport = door.connect()

    def ask(self, turn: Ask) -> Answer:
        """The answer to a turn, however it comes."""
        answer = send(self._transport, turn, streamed=self._streamed, answer=Answer())
        answer.session = (self._transport.session if turn.start else None) or turn.session_id
        return answer

    def stream(self, turn: Ask) -> Generator[Delta, None, None]:
        """Pieces as they come, where the door streams."""
        return self._transport.stream(turn)

    def leave(self, turn: Ask) -> None:
        """Ask, and go away in the middle of the answer."""
        if not self._streamed:
            self._transport.leave(turn)
            return
        pieces = self.stream(turn)
        next(piece for piece in pieces if piece.text)
        pieces.close()

    def cancel(self) -> None:
        """Break off the stream that runs, from another thread."""
        self._transport.cancel()

    def close(self) -> None:
        """Let it go."""
        self._transport.close()


def doors_of(server: TritonServer, adapter_port: int) -> dict[str, Door]:
    """All doors of a server and the adapter in front of it, by name."""
    grpc, http_port = server.grpc_address, server.ports["http"]
    doors = (
        Door("http", "triton", False, lambda: Http(http_port, TRITON_PATH)),
        Door("grpc", "triton", False, lambda: Grpc(grpc)),
        Door("grpc-stream", "triton", True, lambda: Grpc(grpc)),
        Door("adapter", "adapter", False, lambda: Http(adapter_port, ADAPTER_PATH)),
        Door("adapter-stream", "adapter", True, lambda: Http(adapter_port, ADAPTER_PATH)),
    )
    return {door.name: door for door in doors}


DOORS = ("http", "grpc", "grpc-stream", "adapter", "adapter-stream")
"""Their names."""


_CLOSED = Delta("", "closed", 0, 0, 0, 0.0)


def _only_closes(turn: Ask) -> bool:
    return turn.end and not turn.start and turn.text is None and not turn.images


def _delta(outputs: dict[str, Any]) -> Delta:
    names = ("finish_reason", "num_input_tokens", "num_output_tokens", "num_cached_tokens")
    values = {name: outputs[name] for name in (*names, "first_token_ms")}
    return Delta(text=outputs["text_output"], **values)


def _adapter_error(told: dict[str, Any]) -> SessionError:
    return SessionError(_CODES.get(told["code"], ErrorCode.INVALID_ARG), told["message"])
