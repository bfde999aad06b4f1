"""The models that Triton serves, without Triton."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.contract import protocol
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import not_found
from llava_triton.contract.models import MODELS
from llava_triton.contract.settings import FILE_NAME, Settings
from llava_triton.model.runner import ModelRunner
from llava_triton.serving.answer_collector import AnswerCollector
from llava_triton.serving.disconnect_watch import DisconnectWatch
from llava_triton.serving.image_encoder import ImageEncoder
from llava_triton.serving.language_model import LanguageModel
from llava_triton.serving.vision_encoder import VisionEncoder
from llava_triton.serving.whole_answers import Outbox
from tests.engine_harness import SMALL_MEMORIES
from tests.python_backend import (
    InferenceResponse,
    PythonBackend,
    Request,
    Tensor,
    TritonError,
    refusing,
)

START, END, BOTH = 1, 2, 3
PATIENCE_SECONDS = 60.0


def strings(*items: str | bytes) -> np.ndarray:
    return np.array([each.encode() if isinstance(each, str) else each for each in items], object)


def refusal(response: InferenceResponse) -> tuple[int, str]:
    error = response.error()
    assert error is not None
    return error.code, error.message()


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


# disconnect_watch


def test_the_turn_of_a_client_that_has_gone_is_cancelled() -> None:
    backend = PythonBackend(language_model=refusing("INTERNAL: no"))
    model = DisconnectWatch(backend)
    model.initialize({})
    turns = [("", True), ("gone", True), ("here", False)]
    requests = [Request({"turn_id": strings(each)}, cancelled=left) for each, left in turns]
    responses = model.execute(requests)
    model.finalize()
    assert [each.tensors for each in responses] == [{}, {}, {}]
    (call,) = backend.calls
    assert (call.model_name, call.correlation_id, call.flags) == ("language_model", "gone", BOTH)
    assert call.parameters == {protocol.CANCEL_TURN: "gone"}


# vision_encoder


class Encoding:
    name = "a test"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        if pixels[0, 0, 0, 0] < 0:
            raise ValueError("too dark")
        return pixels[:, 0]


@pytest.fixture
def vision_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> VisionEncoder:
    monkeypatch.setattr(
        "llava_triton.serving.vision_encoder.vision_encoding", lambda *_: Encoding()
    )
    (tmp_path / FILE_NAME).write_text(Settings().to_json())
    model = VisionEncoder(PythonBackend())
    model.initialize({"model_repository": str(tmp_path / "vision_encoder")})
    return model


def test_requests_are_encoded_together_and_answered_apart(vision_encoder: VisionEncoder) -> None:
    pixels = [np.random.default_rng(n).random((n, 3, 2, 2), np.float32) for n in (1, 3, 2)]
    requests = [Request({"pixel_values": each}) for each in pixels]
    for given in (requests, requests[:1]):
        for response, each in zip(vision_encoder.execute(given), pixels, strict=False):
            assert (response.tensors["image_features"].as_numpy() == each[:, 0]).all()


def test_a_batch_that_fails_is_told_to_everybody(vision_encoder: VisionEncoder) -> None:
    dark = Request({"pixel_values": np.full((1, 3, 2, 2), -1.0, np.float32)})
    told = [refusal(each) for each in vision_encoder.execute([dark, dark])]
    assert told == [(TritonError.INTERNAL, "INTERNAL: the vision encoder failed: too dark")] * 2


# answer_collector


def collector(backend: PythonBackend) -> AnswerCollector:
    model = AnswerCollector(backend)
    model.initialize({})
    return model


def test_a_turn_is_handed_on_and_answered_by_whom_has_taken_it() -> None:
    outbox, backend = Outbox(), PythonBackend()
    model = collector(backend)
    parameters = {protocol.TENANT: "alice", protocol.ROOM: "forged"}
    inputs = {"text_input": strings("Who?")}
    request = Request(inputs, session="a", flags=START, parameters=parameters)
    refused = Request(session=7)
    model.execute([request, refused])
    first, second = backend.calls
    assert (first.correlation_id, first.flags, first.inputs) == ("a", START, request.inputs())
    assert first.parameters.pop(protocol.TENANT) == "alice"
    assert set(first.parameters) == set(second.parameters) == {protocol.WHOLE_ANSWER}
    final = Delta("A cat.", "stop", 7, 3, 5, 1.5)
    outbox.send(first.parameters[protocol.WHOLE_ANSWER], final)
    outbox.send(second.parameters[protocol.WHOLE_ANSWER], not_found("gone"))
    (response,) = request.sender.wait()
    arrays = {name: tensor.as_numpy() for name, tensor in response.tensors.items()}
    assert ANSWER.from_arrays(arrays.__getitem__) == final
    (response,) = refused.sender.wait()
    assert refusal(response) == (TritonError.NOT_FOUND, "NOT_FOUND: gone")
    outbox.close()
    model.finalize()


def test_a_turn_that_triton_refuses_is_refused_at_once() -> None:
    backend = PythonBackend(language_model=refusing("must specify the START flag"))
    model, request = collector(backend), Request(session=7)
    model.execute([request])
    (response,) = request.sender.wait()
    code, text = refusal(response)
    assert code == TritonError.NOT_FOUND
    assert "unknown or has expired" in text
    model.finalize()


def test_who_still_waits_is_told_at_the_end_and_a_mark_is_answered() -> None:
    model = collector(PythonBackend())
    waits, mark = Request(session=7), Request(parameters={protocol.MARK: True})
    model.execute([waits, mark])
    (response,) = mark.sender.wait()
    assert not response.has_error()
    assert not waits.sender.responses
    model.finalize()
    (response,) = waits.sender.wait()
    assert refusal(response)[0] == TritonError.UNAVAILABLE


# image_encoder


@pytest.fixture
def image_encoder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ImageEncoder]]:
    """Starts image encoders."""
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)  # of their own processes
    processor = tmp_path / "image_encoder" / "1" / "processor"
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(processor)
    (tmp_path / "language_model" / "1").mkdir(parents=True)
    (tmp_path / "language_model" / "1" / "checkpoint").symlink_to(checkpoint)
    (tmp_path / FILE_NAME).write_text(Settings(max_images_per_turn=2).to_json())
    started: list[ImageEncoder] = []

    def start(backend: PythonBackend) -> ImageEncoder:
        model = ImageEncoder(backend)
        model.initialize(
            {"model_repository": str(tmp_path / "image_encoder"), "model_version": "1"}
        )
        started.append(model)
        return model

    yield start
    for model in started:
        model.finalize()


def encoded(model: ImageEncoder, *requests: Request) -> list[InferenceResponse]:
    """The response to each request: returned, or sent later."""
    returned = model.execute(list(requests))
    return [
        request.sender.wait()[0] if response is None else response
        for request, response in zip(requests, returned, strict=True)
    ]


def mean_colors(call: Any) -> list[InferenceResponse]:
    """For a vision encoder: features [N, 1, 3]."""
    pixels = call.inputs[0].as_numpy()
    features = pixels.mean(axis=(2, 3)).astype(np.float32)[:, None]
    return [InferenceResponse([Tensor("image_features", features)])]


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 60), color).save(file, "PNG")
    return file.getvalue()


def test_pictures_become_flat_features_in_their_order(
    image_encoder: Callable[..., ImageEncoder],
) -> None:
    backend = PythonBackend(vision_encoder=mean_colors)
    model = image_encoder(backend)
    one, other = (
        Request({"image": strings(picture("red"), picture("blue"))}, session="a", flags=START),
        Request({"image": strings(picture("blue"))}, session="b"),
    )
    responses = encoded(model, one, other)
    both, single = (each.tensors["image_features"].as_numpy() for each in responses)
    assert (both.dtype, both.shape, single.shape) == (np.uint8, (24,), (12,))
    assert (both[12:] == single).all()
    assert (both[:12] != single).any()
    lengths = responses[0].tensors["image_lengths"].as_numpy()
    assert lengths.view(np.int32).tolist() == [1, 1]
    asked = [call.parameters for call in backend.calls if call.model_name == "language_model"]
    assert asked == [{protocol.ROOM: "a"}]


def test_no_picture_is_an_empty_tensor(image_encoder: Callable[..., ImageEncoder]) -> None:
    request = Request(session="a")
    (response,) = image_encoder(PythonBackend()).execute([request])
    assert request.sender.responses == []  # it costs no message of its own
    assert set(response.tensors) == {spec.name for spec in MODELS["image_encoder"].outputs}
    for tensor in response.tensors.values():
        nothing = tensor.as_numpy()
        assert (nothing.dtype, nothing.shape) == (np.uint8, (0,))


def test_pictures_that_cannot_be_encoded_are_refused(
    image_encoder: Callable[..., ImageEncoder],
) -> None:
    full = "UNAVAILABLE: all 1 sessions are in use; try again later"
    cases: list[tuple[Request, PythonBackend, int, str]] = [
        (Request({"image": strings("?")}), PythonBackend(), 0, "INVALID_ARG: image "),
        (Request({"image": strings("a", "b", "c")}), PythonBackend(), 0, "holds 3 pictures"),
        (
            Request({"image": strings(picture("red"))}, session="a", flags=START),
            PythonBackend(language_model=refusing(full)),
            2,
            full,
        ),
        (
            Request({"image": strings(picture("red"))}, session="a"),
            PythonBackend(vision_encoder=refusing("out of shared memory")),
            4,
            "out of shared memory",
        ),
    ]
    for request, backend, code, text in cases:
        (response,) = encoded(image_encoder(backend), request)
        assert refusal(response)[0] == code
        assert text in refusal(response)[1]


# language_model


class Served:
    """A language model on a tiny checkpoint, and the calls that it makes of itself."""

    def __init__(self, checkpoint: Path, **limits: Any) -> None:
        self.backend = PythonBackend(language_model=self._called)
        self.model = LanguageModel(self.backend)
        loaded = load_checkpoint(checkpoint)
        settings = Settings(**{**SMALL_MEMORIES, **limits})
        self.model.serve(ModelRunner(loaded, settings), loaded.tokenizer, settings)

    def _called(self, call: Any) -> list[InferenceResponse]:
        request = Request(session=call.correlation_id, flags=call.flags, parameters=call.parameters)
        self.model.execute([request])
        return request.sender.wait()

    def send(
        self,
        text: str | None = None,
        *,
        session: int | str = "a",
        flags: int = 0,
        sampling: str = '{"max_tokens": 4, "ignore_eos": true}',
        arrays: dict[str, np.ndarray] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> Request:
        given = {"sampling_parameters": strings(sampling)} | (arrays or {})
        if text is not None:
            given["text_input"] = strings(text)
        request = Request(given, session=session, flags=flags, parameters=parameters)
        self.model.execute([request])
        return request


@pytest.fixture
def served(checkpoint: Path) -> Iterator[Served]:
    served = Served(checkpoint, max_sessions=1)
    yield served
    served.model.finalize()


def test_an_answer_is_streamed_with_every_output(served: Served) -> None:
    responses = served.send("What is it?", flags=START).sender.wait()
    for response in responses:
        assert set(response.tensors) == {spec.name for spec in MODELS["language_model"].outputs}
    assert [each.value("finish_reason") for each in responses][-1] == b"length"
    assert responses[-1].value("num_output_tokens") == 4
    again = served.send("And now?").sender.wait()
    assert again[-1].value("num_cached_tokens") >= responses[-1].value("num_input_tokens")


def test_a_client_that_calls_it_itself_is_looked_after_here(served: Served) -> None:
    """Who does not ask for the turn's ID has no disconnect_watch."""
    outputs = [spec.name for spec in ANSWER.outputs]
    endless = {"sampling_parameters": strings('{"max_tokens": 900, "ignore_eos": true}')}
    request = Request(
        {"text_input": strings("What is it?"), **endless},
        session="a",
        flags=BOTH,
        outputs=outputs,
    )
    served.model.execute([request])
    wait_for(lambda: bool(request.sender.responses))
    request.sender.cancelled = True
    *pieces, last = request.sender.wait()
    assert refusal(last)[0] == TritonError.CANCELLED
    assert all(set(piece.tensors) == set(outputs) for piece in pieces)


def test_an_answer_that_is_wanted_whole_leaves_an_empty_response(served: Served) -> None:
    collector_backend = PythonBackend(
        language_model=lambda call: served.send(
            "What is it?", flags=START, parameters=call.parameters
        ).sender.wait()
    )
    model, asked = collector(collector_backend), Request(session="a", flags=START)
    model.execute([asked])
    (response,) = asked.sender.wait()
    assert response.value("num_output_tokens") == 4
    model.finalize()


def test_a_session_that_is_refused_is_released_before_its_client_hears_of_it(
    served: Served,
) -> None:
    served.send(flags=START).sender.wait()
    (response,) = served.send("Me too?", session="b", flags=START).sender.wait()
    assert refusal(response)[0] == TritonError.UNAVAILABLE
    (release,) = served.backend.calls
    assert (release.correlation_id, release.flags) == ("b", END)
    assert set(release.parameters) == {protocol.RELEASE}
    served.send("Guess", session="a", parameters={protocol.RELEASE: "guessed"}).sender.wait()
    assert not served.send("And?").sender.wait()[-1].has_error()


def test_no_line_of_the_log_has_an_id(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse = refusing("INTERNAL: the sequence secret-1 is not known")
    monkeypatch.setattr(Served, "_called", lambda _, call: refuse(call))
    served = Served(checkpoint, log_turns=True)
    for source in ("secret-1-2", "secret\\3", 4711):
        copy = {"fork": source}
        served.send(session="secret-1", flags=START, parameters=copy).sender.wait()
    served.send("?", session="secret-1").sender.wait()
    served.model.finalize()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["outcome"] for line in lines] == ["NOT_FOUND"] * 4
    for told in (*(line["error"] for line in lines), *caplog.messages):
        assert "secret" not in told
        assert "4711" not in told
        assert "1-2" not in told
    assert len(caplog.messages) == 3


def test_room_is_told(served: Served) -> None:
    room = {protocol.ROOM: "b"}
    assert served.send(session="x", flags=BOTH, parameters=room).sender.wait() == []
    served.send(flags=START).sender.wait()
    (response,) = served.send(
        session="y", flags=BOTH, parameters={protocol.ROOM: "b"}
    ).sender.wait()
    assert refusal(response)[0] == TritonError.UNAVAILABLE
    assert (
        served.send(session="z", flags=BOTH, parameters={protocol.MARK: True}).sender.wait() == []
    )


def test_a_turn_is_cancelled_by_its_id(served: Served) -> None:
    long = '{"max_tokens": 100000, "ignore_eos": true}'
    request = served.send("Tell me.", flags=START, sampling=long)
    wait_for(lambda: any(each.value("turn_id") for each in request.sender.responses))
    turn_id = next(
        each.value("turn_id").decode() for each in request.sender.responses if each.value("turn_id")
    )
    parameters = {protocol.CANCEL_TURN: turn_id}
    assert served.send(session=turn_id, flags=BOTH, parameters=parameters).sender.wait() == []
    assert refusal(request.sender.wait()[-1])[0] == TritonError.CANCELLED


@pytest.mark.parametrize(
    ("arrays", "sampling", "text"),
    [
        ({}, '{"top_p": 7}', "sampling parameter top_p is 7"),
        ({"image_features": np.zeros(3, np.uint8)}, "", "image_features and image_lengths come"),
        (
            {"image_features": np.zeros(3, np.uint8), "image_lengths": np.zeros(0, np.uint8)},
            "",
            "image_features has 3 bytes",
        ),
        ({"history": strings("[")}, "", "history is not valid JSON"),
    ],
)
def test_bad_inputs_are_refused_and_an_end_ends_all_the_same(
    served: Served, arrays: dict[str, np.ndarray], sampling: str, text: str
) -> None:
    served.send(flags=START).sender.wait()
    for flags in (0, END):
        request = served.send("What?", flags=flags, sampling=sampling, arrays=arrays)
        code, told = refusal(request.sender.wait()[-1])
        assert code == TritonError.INVALID_ARG
        assert text in told
    (response,) = served.send("Still there?").sender.wait()
    assert refusal(response)[0] == TritonError.NOT_FOUND
