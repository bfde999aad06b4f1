"""Answers of a given form: which tokens may come next.

The forms are read by llguidance. It compiles nothing beforehand but parses what the model says, and
works out with each token which ones may follow. What that may take is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance.hf import from_tokenizer

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import SAMPLING_PARAMETERS
from llava_triton.contract.structured_outputs import StructuredOutputs

_INITIAL_LEXER_FUEL = 1_000_000
"""Work of compiling; llguidance puts 50,000 at a millisecond."""
_STEP_LEXER_FUEL = 20_000
"""Work of one token's mask; llguidance puts 14,000 at a millisecond, and allows 200,000."""
_MAX_LEXER_STATES = 10_000
"""Of at most 2 kB each."""
_MAX_GRAMMAR_SIZE = 100_000
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As json.dumps writes: with any whitespace allowed, a model could go on with it for ever."""
_MOST_CHARACTERS = 200
"""Of what llguidance says is wrong."""

Bits = np.ndarray[Any, np.dtype[np.int32]]


class Grammar:
    """One answer on its way, and what may come next in it. One thread at a time.

    Args:
        matcher: llguidance's.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Bits:
        """A bit for each token, int32 [ceil(V / 32)], the first one the lowest: whether it may be
        the next one. None may be where the parser has failed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        # Having failed, it would have the answer end.
        return np.zeros_like(bits) if self._matcher.is_error() else bits

    def take(self, token: int) -> None:
        """The next token of the answer. (One that may not come makes the parser fail.)"""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether the answer has the form, and nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> SessionError | None:
        """Why the parser has failed, if it has."""
        if not self._matcher.is_error():
            return None
        return _refused("could be followed no further in this answer", self._matcher)


class Grammars:
    """Compiles forms for one model's tokens.

    Made before anything is served: for a large vocabulary it takes seconds, in which it holds the
    interpreter's lock.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: how many tokens the model has logits for.
        eos_token_ids: end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_token_ids: Collection[int]) -> None:
        ends = [token for token in sorted(eos_token_ids) if token < len(tokenizer)]
        self._tokens = None
        if ends:
            self._tokens = from_tokenizer(
                tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=ends
            )
        decoder = tokenizer.backend_tokenizer.decoder
        takes_one = decoder is not None and decoder.decode(["▁a"]) == "a"
        self._hidden_spaces = 2 if takes_one else 1
        """How many spaces an answer may begin with that are not shown: SentencePiece's decoder
        takes one away, and `Detokenizer` another one."""

    def compile(self, form: StructuredOutputs) -> Grammar:
        """A new answer of this form. It may take some hundred milliseconds; for any thread.

        Raises:
            SessionError: INVALID_ARG, the form cannot be followed.
        """
        if self._tokens is None:
            raise invalid(
                "structured_outputs needs a token that ends an answer, and this model has none; "
                "leave it out",
                SAMPLING_PARAMETERS.name,
            )
        grammar = LLMatcher.grammar_from_lark(_lark(form, self._hidden_spaces))
        limits = LLParserLimits(
            initial_lexer_fuel=_INITIAL_LEXER_FUEL,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._tokens, grammar, limits=limits, log_level=0)
        first = matcher.compute_bitmask()  # what it takes is part of compiling
        if matcher.is_error() or not any(first):
            raise _refused("cannot be followed", matcher)
        return Grammar(matcher)


def _lark(form: StructuredOutputs, hidden: int) -> str:
    """A grammar in llguidance's dialect of Lark.

    A model may begin its answer with a space, as it has learned to. What is shown lacks up to
    `hidden` spaces. So a form that begins with a space must stand behind all of those, and any
    other one may stand behind some.
    """
    if form.json is not None:
        schema = {**json.loads(form.json), "x-guidance": _JSON_STYLE}
        return f'start: " "? body\nbody: %json {json.dumps(schema)}\n'
    if form.regex is not None:
        regex = f"/{regex_to_lark(form.regex)}/"
        behind_all = f'("{" " * hidden}" {regex})'
        behind_some = f"(/ {{0,{hidden}}}/ ({regex} & ~/(?s: .*)/))"
        return f"start: TEXT\nTEXT: {behind_all} | {behind_some}\n"
    spelled = [
        " " * spaces + choice
        for choice in form.choice
        for spaces in range(hidden if choice.startswith(" ") else 0, hidden + 1)
    ]
    return f"start: TEXT\nTEXT: {' | '.join(map(json.dumps, spelled))}\n"


def _refused(what: str, matcher: LLMatcher) -> SessionError:
    lines = [line.strip() for line in str(matcher.get_error()).splitlines()]
    lines = lines or ["no answer has this form"]
    # Of a regular expression the first line repeats it, and one further down says what is wrong.
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    said = re.sub(r"^(at \d+\(\d+\)|error|failed to compile JSON schema): ", "", said)
    said = said.removeprefix("failed to compile JSON schema: ")
    return invalid(
        f"structured_outputs {what}: {said[:_MOST_CHARACTERS]}; give a simpler form, or one that "
        "llguidance supports",
        SAMPLING_PARAMETERS.name,
    )
