"""How many tokens a text makes at the least, without making them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import pre_tokenizers

_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Split")
"""Pre-tokenizers that leave no character out. (`Split` may: see `_keeps_everything`.)"""


class FewestTokens:
    """A lower bound for texts of one tokenizer: their length over that of its longest token.

    Counting takes a thousandth of the time of tokenizing. It holds for byte-pair encodings that
    make a token of everything; of other tokenizers' texts it says 0.

    Args:
        backend: of the library `tokenizers`.
    """

    def __init__(self, backend: Any) -> None:
        described = json.loads(backend.to_str())
        steps = _steps(described["pre_tokenizer"])
        self._normalizer = backend.normalizer
        self._in_bytes = any(step["type"] == "ByteLevel" for step in steps)
        vocabulary = described["model"].get("vocab", ())
        added = described["added_tokens"]
        self._longest = 0
        """Characters, or bytes, of the longest token; 0: there is no bound."""
        if (
            all(map(_keeps_everything, steps))
            and _makes_tokens_of_everything(described["model"], self._in_bytes)
            # Those would take the spaces around them along, however many.
            and not any(token["lstrip"] or token["rstrip"] for token in added)
        ):
            names = [*vocabulary, *(token["content"] for token in added)]
            self._longest = max(len(name) for name in names)

    def __call__(self, text: str) -> int:
        """The bound."""
        if not self._longest:
            return 0
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        length = len(text.encode()) if self._in_bytes else len(text)
        return -(-length // self._longest)


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    return [pre_tokenizer]


def _keeps_everything(step: dict[str, Any]) -> bool:
    return step["type"] in _KEEPING and step.get("behavior") != "Removed"


def _makes_tokens_of_everything(model: dict[str, Any], in_bytes: bool) -> bool:
    if model["type"] != "BPE":
        return False
    vocabulary = model["vocab"]
    if in_bytes:
        return all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    if model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model["unk_token"] is not None and not model["fuse_unk"]
