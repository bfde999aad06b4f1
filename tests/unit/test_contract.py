"""The one table of inputs and outputs, and all that follows from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from llava_triton.contract.answers import ANSWER, AnswerTensors
from llava_triton.contract.configuration import configured
from llava_triton.contract.delta import Delta
from llava_triton.contract.models import MODELS
from llava_triton.contract.tensors import TensorSpec

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "model_repository").glob("*/config.pbtxt"))
PUBLIC_INPUTS = [
    ("text_input", "TYPE_STRING", [1], True),
    ("image", "TYPE_STRING", [-1], True),
    ("video", "TYPE_STRING", [-1], True),
    ("image_positions", "TYPE_STRING", [1], True),
    ("sampling_parameters", "TYPE_STRING", [1], True),
    ("history", "TYPE_STRING", [1], True),
]
PUBLIC_OUTPUTS = [
    ("text_output", "TYPE_STRING", [1], False),
    ("finish_reason", "TYPE_STRING", [1], False),
    ("num_input_tokens", "TYPE_INT32", [1], False),
    ("num_output_tokens", "TYPE_INT32", [1], False),
    ("num_cached_tokens", "TYPE_INT32", [1], False),
    ("first_token_ms", "TYPE_FP32", [1], False),
    ("num_forgotten_turns", "TYPE_INT32", [1], False),
    ("logprobs", "TYPE_STRING", [-1], False),
]


@dataclass(frozen=True)
class OneMore(Delta):
    """Pieces with one line more."""

    log_probabilities: Annotated[tuple[float, ...], TensorSpec("log_probabilities", "FP32", (-1,))]


ONE_MORE = AnswerTensors(OneMore)
PIECES: list[Any] = [
    (ANSWER, Delta("東", "length", 10, 2, 7, 1.5)),
    (ANSWER, Delta("", "", 0, 0, 0, 0.0)),
    (ANSWER, Delta("", "", 0, 0, 0, 0.0, logprobs=('{"token": "東"}', "{}"))),
    (ONE_MORE, OneMore("a red", "", 10, 2, 7, 1.5, (-0.5, -2.0))),
    (ONE_MORE, OneMore("", "stop", 10, 0, 7, 0.0, ())),
]


def tensors(declared: Any) -> list[tuple[str, str, list[int], bool]]:
    return [
        (
            each.name,
            DataType.Name(each.data_type),
            list(each.dims),
            getattr(each, "optional", False),
        )
        for each in declared
    ]


def parsed(text: str) -> Any:
    return text_format.Parse(text, ModelConfig())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_files_are_what_the_table_says(path: Path) -> None:
    text = path.read_text()
    assert text == configured(text), "run `python -m llava_triton.contract`"
    config, model = parsed(text), MODELS[path.parent.name]
    assert config.name == path.parent.name
    assert [each.name for each in config.input] == [spec.name for spec in model.inputs]
    assert [each.name for each in config.output] == [spec.name for spec in model.outputs]
    for step in config.ensemble_scheduling.step:
        called = MODELS[step.model_name]
        assert dict(step.input_map) == {spec.name: spec.name for spec in called.inputs}
        assert dict(step.output_map) == {spec.name: spec.name for spec in called.outputs}


def test_every_model_has_a_file() -> None:
    assert {path.parent.name for path in CONFIGS} == set(MODELS)


def test_what_clients_know_has_not_changed() -> None:
    configs = {path.parent.name: parsed(path.read_text()) for path in CONFIGS}
    for name, more in (
        ("llava", []),
        ("llava_stream", [("turn_watched", "TYPE_BOOL", [1], False)]),
    ):
        assert tensors(configs[name].input) == PUBLIC_INPUTS
        assert tensors(configs[name].output) == PUBLIC_OUTPUTS + more


def test_a_file_is_written_from_nothing_else_than_its_name() -> None:
    text = next(path for path in CONFIGS if path.parent.name == "llava").read_text()
    stripped = re.sub(r"^ *(in|out)put_map .*\n", "", text, flags=re.M)
    stripped = re.sub(r"^(input|output) \[.*?^\]", r"\1 [ ]", stripped, flags=re.M | re.S)
    assert len(stripped) < len(text) / 2
    assert configured(stripped) == text


@pytest.mark.parametrize(("answer", "piece"), PIECES)
def test_a_piece_survives_each_of_its_ways(answer: AnswerTensors[Any], piece: Delta) -> None:
    arrays = answer.to_arrays(piece)
    assert answer.from_arrays(arrays.__getitem__) == piece
    assert answer.from_raw(answer.to_raw(piece)) == piece
    assert answer.from_values(json.loads(json.dumps(answer.to_values(piece)))) == piece
    assert [*arrays] == [*answer.to_raw(piece)] == [spec.name for spec in answer.outputs]


def test_arrays_and_bytes_are_those_that_the_models_declare() -> None:
    delta = Delta("東", "length", 10, 2, 7, 1.5)
    arrays = ANSWER.to_arrays(delta)
    assert arrays.pop("logprobs").shape == (0,)
    assert all(array.shape == (1,) for array in arrays.values())
    assert arrays["text_output"][0] == "東".encode()
    assert arrays["finish_reason"][0] == b"length"
    numbers = [arrays[f"num_{name}_tokens"] for name in ("input", "output", "cached")]
    assert [array.dtype for array in numbers] == [np.int32] * 3
    assert [int(array[0]) for array in numbers] == [10, 2, 7]
    assert arrays["first_token_ms"].dtype == np.float32
    raw = ANSWER.to_raw(delta)
    assert raw["text_output"] == b"\x03\0\0\0" + "東".encode()
    assert raw["num_input_tokens"] == b"\x0a\0\0\0"
    assert raw["first_token_ms"] == b"\0\0\xc0\x3f"
    assert delta.is_final
    assert not Delta("東", "", 10, 2, 7, 1.5).is_final


def test_pieces_are_joined() -> None:
    first, last = Delta("a ", "", 9, 1, 4, 1.5), Delta("red", "stop", 9, 2, 4, 1.5)
    assert ANSWER.joined((first,)) == first
    assert ANSWER.joined((first, last)) == Delta("a red", "stop", 9, 2, 4, 1.5)
    pieces = [OneMore("a", "", 9, 1, 4, 1.5, (-1.0,)), OneMore("b", "", 9, 3, 4, 1.5, (-2.0, -3.0))]
    assert ONE_MORE.joined(pieces).log_probabilities == (-1.0, -2.0, -3.0)


def test_a_missing_output_is_told() -> None:
    values = ANSWER.to_values(Delta("", "stop", 1, 1, 1, 1.0))
    del values["num_cached_tokens"]
    with pytest.raises(LookupError, match="num_cached_tokens"):
        ANSWER.from_values(values)


def test_the_table_is_light() -> None:
    program = "import sys, llava_triton.contract.models; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "tritonclient", "PIL"} & set(loaded)
