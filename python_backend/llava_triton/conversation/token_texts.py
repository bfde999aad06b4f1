"""What single tokens say, for those who look at an answer token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

_LEAST_LOGPROB = -9999.0
"""What stands for less, as at OpenAI: JSON has no number for minus infinity."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The bytes of a tokenizer's tokens.

    A token may be a part of a character. All tokens of an answer together are its text, but for a
    leading space.

    Args:
        tokenizer: a fast tokenizer of transformers, byte-level or like SentencePiece's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        decoder = tokenizer.backend_tokenizer.decoder
        described = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
        steps = described.get("decoders", [described])
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in steps)

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8, or a part of it."""
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:  # the model has more logits than the tokenizer has tokens
            return b""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if self._is_byte_level:
            return bytes(_byte_of_character()[character] for character in name)
        byte = _BYTE.fullmatch(name)
        if byte:
            return bytes([int(byte[1], 16)])
        return str(name).replace("▁", " ").encode()

    def told(self, token_id: int, logprob: float, top: Iterable[tuple[int, float]]) -> str:
        """A token of an answer as JSON, in the shape of OpenAI's `logprobs.content`.

        Args:
            token_id, logprob: of the token.
            top: those of the likeliest tokens in its place.
        """
        likeliest = [self._described(*each) for each in top]
        return json.dumps({**self._described(token_id, logprob), "top_logprobs": likeliest})

    def _described(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self.bytes_of(token_id)
        return {
            "token": spelled.decode(errors="replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(spelled),
        }


@cache
def _byte_of_character() -> dict[str, int]:
    """What byte each character of a byte-level token's name stands for: printable ones for
    themselves, the others, in order, are the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
