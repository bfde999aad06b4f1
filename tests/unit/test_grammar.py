"""Answers of a given form, token by token, whatever the model would like to say."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.sampling_parameters import SamplingParameters
from llava_triton.contract.structured_outputs import StructuredOutputs
from llava_triton.conversation.detokenizer import Detokenizer
from llava_triton.conversation.grammar import Grammars
from tests import tokenizers_for_tests

LONGEST = 300
"""Tokens; an answer of random tokens may go on for ever."""
SHAPE = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "size": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/size"}], "title": "Size"},
        "name": {"type": "string", "maxLength": 8, "description": "any"},
    },
    "required": ["colour", "count", "size", "name"],
    "additionalProperties": False,
    "$defs": {"size": {"type": "array", "items": {"const": "large"}, "maxItems": 3}},
}
FORMS: dict[str, dict[str, Any]] = {
    "schema": {"json": SHAPE},
    "object": {"json_object": True},
    "regex": {"regex": r"(a/b|[0-9]{2}:\d{2}|\"x\"|東|^ ?y$)"},
    "choice": {"choice": ["red", " a space", 'a "quote"\\\n', "東京"]},
}


def form_of(value: dict[str, Any]) -> StructuredOutputs:
    form = SamplingParameters.from_json(
        json.dumps({"structured_outputs": value})
    ).structured_outputs
    assert form is not None
    return form


def has_form(name: str, text: str) -> bool:
    if name == "schema":
        jsonschema.validate(json.loads(text), SHAPE)
        return True
    if name == "object":
        return isinstance(json.loads(text), dict)
    if name == "regex":
        return re.fullmatch(FORMS["regex"]["regex"], text) is not None
    return text in FORMS["choice"]["choice"]


@pytest.fixture(
    scope="module",
    params=[
        tokenizers_for_tests.byte_level,
        tokenizers_for_tests.sentence_piece,
        tokenizers_for_tests.of_demo_checkpoint,
    ],
)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    make: Callable[[], Any] = request.param
    return make()


@pytest.fixture
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, len(tokenizer) + 5, {tokenizer.eos_token_id})


@pytest.mark.parametrize("name", FORMS)
def test_every_answer_that_ends_has_the_form(name: str, grammars: Grammars, tokenizer: Any) -> None:
    """Of a model that says any token that it may."""
    ended = 0
    for seed in range(40):
        chance = random.Random(f"{name} {seed}")
        grammar, detokenizer = grammars.compile(form_of(FORMS[name])), Detokenizer(tokenizer)
        for _ in range(LONGEST):
            bits = grammar.allowed()
            assert bits.shape == (-(-(len(tokenizer) + 5) // 32),)
            may = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            token = int(chance.choice(may))
            ends = token == tokenizer.eos_token_id
            if not ends:
                detokenizer.push(token)
                grammar.take(token)
            assert grammar.error is None
            if ends or grammar.is_complete:
                detokenizer.flush()
                assert has_form(name, detokenizer.text), detokenizer.text
                ended += 1
                break
    assert ended >= 10


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"json": {"type": "string", "enum": []}}, "Unsatisfiable schema"),
        ({"regex": "[a&&b]"}, "NoExtension"),
        ({"json": {"$ref": "http://127.0.0.1:1/schema.json"}}, "retrieving it failed"),
        ({"regex": "(" * 500 + "a" + ")" * 500}, "nested parentheses"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(
    form: dict[str, Any], said: str, grammars: Grammars
) -> None:
    with pytest.raises(SessionError) as caught:
        grammars.compile(form_of(form))
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert caught.value.sentence.startswith("structured_outputs cannot be followed: ")
    assert said in caught.value.sentence
    assert len(caught.value.sentence) < 400
    assert "\n" not in caught.value.sentence


def test_a_model_without_an_end_takes_no_form() -> None:
    tokenizer = tokenizers_for_tests.byte_level()
    with pytest.raises(SessionError, match="a token that ends an answer"):
        Grammars(tokenizer, len(tokenizer), ()).compile(form_of({"regex": "a"}))


def test_a_model_may_have_fewer_or_more_tokens_than_its_tokenizer() -> None:
    tokenizer = tokenizers_for_tests.byte_level()
    for vocabulary in (len(tokenizer) - 3, len(tokenizer) + 40):
        grammar = Grammars(tokenizer, vocabulary, {tokenizer.eos_token_id, 10**6}).compile(
            form_of({"choice": ["a"]})
        )
        bits = grammar.allowed()
        assert len(bits) >= vocabulary / 32
        assert bits.any()


def test_a_parser_that_fails_lets_nothing_end_the_answer() -> None:
    tokenizer = tokenizers_for_tests.byte_level()
    grammar = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id}).compile(
        form_of({"choice": ["red"]})
    )
    grammar.take(tokenizer("b", add_special_tokens=False)["input_ids"][0])
    assert not grammar.allowed().any()
    assert not grammar.is_complete
    assert grammar.error is not None
    assert grammar.error.code is ErrorCode.INVALID_ARG
    assert "could be followed no further" in grammar.error.sentence
