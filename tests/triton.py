"""Talking to the server with nothing but tritonclient, for tests."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """One response: the whole answer of `llava`, or one piece of `llava_stream`."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    first_token_ms: float
    logprobs: tuple[Any, ...] = ()
    """Read from JSON."""


Asker = Callable[..., Answer]
"""`ask`, over one of the protocols: without its client."""


def inputs(
    module: ModuleType,
    text: str | bytes | None = None,
    images: Sequence[bytes] | None = None,
    parameters: dict[str, Any] | str | bytes | None = None,
    history: Any = None,
    positions: Any = None,
    videos: Sequence[bytes] | None = None,
) -> list[Any]:
    """Input tensors of `llava` and `llava_stream` for `tritonclient.grpc` or `.http`."""
    made = []
    if text is not None:
        made.append(_bytes_tensor(module, "text_input", [text]))
    if images is not None:
        made.append(_bytes_tensor(module, "image", images))
    if videos is not None:
        made.append(_bytes_tensor(module, "video", videos))
    if parameters is not None:
        encoded = json.dumps(parameters) if isinstance(parameters, dict) else parameters
        made.append(_bytes_tensor(module, "sampling_parameters", [encoded]))
    if history is not None:
        encoded = history if isinstance(history, str) else json.dumps(history)
        made.append(_bytes_tensor(module, "history", [encoded]))
    if positions is not None:
        encoded = positions if isinstance(positions, str) else json.dumps(positions)
        made.append(_bytes_tensor(module, "image_positions", [encoded]))
    return made


def ask(
    client: Any,
    text: str | bytes | None = None,
    *,
    session: str | int = 0,
    images: Sequence[bytes] | None = None,
    parameters: dict[str, Any] | str | bytes | None = None,
    history: Any = None,
    positions: Any = None,
    videos: Sequence[bytes] | None = None,
    start: bool = False,
    end: bool = False,
    model: str = "llava",
) -> Answer:
    """One turn, answered whole, over the client's protocol.

    Raises:
        tritonclient.utils.InferenceServerException: the server refused it.
    """
    over_grpc = isinstance(client, tritonclient.grpc.InferenceServerClient)
    module = tritonclient.grpc if over_grpc else tritonclient.http
    result = client.infer(
        model,
        inputs(module, text, images, parameters, history, positions, videos),
        sequence_id=session,
        sequence_start=start,
        sequence_end=end,
    )
    return answer_of(result)


class Stream:
    """A gRPC stream of its own; `turn` sends one turn and yields its pieces as they come."""

    def __init__(self, address: str) -> None:
        self.client = tritonclient.grpc.InferenceServerClient(address)
        self._arrived: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self.client.start_stream(lambda result, error: self._arrived.put((result, error)))

    def send(
        self,
        text: str | bytes | None = None,
        *,
        session: str | int = 0,
        images: Sequence[bytes] | None = None,
        parameters: dict[str, Any] | str | bytes | None = None,
        history: Any = None,
        positions: Any = None,
        videos: Sequence[bytes] | None = None,
        start: bool = False,
        end: bool = False,
        model: str = "llava_stream",
    ) -> None:
        """Send one turn and return at once."""
        self.client.async_stream_infer(
            model,
            inputs(tritonclient.grpc, text, images, parameters, history, positions, videos),
            sequence_id=session,
            sequence_start=start,
            sequence_end=end,
            enable_empty_final_response=True,
        )

    def pieces(self, timeout: float = WAIT_SECONDS) -> Iterator[Answer]:
        """The responses of the turn sent last, until its final one.

        Raises:
            tritonclient.utils.InferenceServerException: the turn failed.
            queue.Empty: nothing came for `timeout` seconds.
        """
        while True:
            result, error = self._arrived.get(timeout=timeout)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield answer_of(result)
            if response.parameters["triton_final_response"].bool_param:
                return

    def turn(self, text: str | bytes | None = None, **arguments: Any) -> Iterator[Answer]:
        """`send`, then `pieces`."""
        self.send(text, **arguments)
        yield from self.pieces()

    def cancel(self) -> None:
        """Break off whatever runs, as a client does that goes away; the stream is closed."""
        self.client.stop_stream(cancel_requests=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream()
        self.client.close()


def whole(pieces: Iterator[Answer]) -> Answer:
    """A stream's pieces as one answer."""
    got = list(pieces)
    final = got[-1]
    assert [piece.finish_reason for piece in got[:-1]] == [""] * (len(got) - 1)
    logprobs = tuple(token for piece in got for token in piece.logprobs)
    return replace(final, text="".join(piece.text for piece in got), logprobs=logprobs)


def answer_of(result: Any) -> Answer:
    """The outputs of one response; those it lacks are empty or 0."""
    return Answer(
        text=_first(result, "text_output", b"").decode(),
        finish_reason=_first(result, "finish_reason", b"").decode(),
        num_input_tokens=int(_first(result, "num_input_tokens", 0)),
        num_output_tokens=int(_first(result, "num_output_tokens", 0)),
        num_cached_tokens=int(_first(result, "num_cached_tokens", 0)),
        first_token_ms=float(_first(result, "first_token_ms", 0.0)),
        logprobs=tuple(map(json.loads, _all(result, "logprobs"))),
    )


def _bytes_tensor(module: ModuleType, name: str, values: Sequence[str | bytes]) -> Any:
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    tensor = module.InferInput(name, [len(encoded)], "BYTES")
    array = np.empty(len(encoded), dtype=np.object_)
    array[:] = encoded
    tensor.set_data_from_numpy(array)
    return tensor


def _all(result: Any, name: str) -> list[Any]:
    array = result.as_numpy(name)
    return [] if array is None else array.reshape(-1).tolist()


def _first(result: Any, name: str, default: Any) -> Any:
    array = result.as_numpy(name)
    return default if array is None or array.size == 0 else array.reshape(-1)[0]
