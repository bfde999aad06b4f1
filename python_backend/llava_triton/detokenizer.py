"""Tokens to text that may be shown: never part of a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


class Detokenizer:
    """Turns one answer's tokens into text, piece by piece.

    The pieces, joined, are the tokenizer's decoding of all tokens without special ones, up to the
    first stop string, without the one space that may lead it: byte-level tokenizers begin an
    answer with " Red", SentencePiece ones with "Red".

    Args:
        tokenizer: the checkpoint's.
        stop: strings that end the answer; non-empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # A token's text depends on its neighbours, so the decoding starts a little before what
        # is new: `_ids[_window:_settled]` are given out already and serve as the neighbourhood.
        self._window = 0
        self._settled = 0
        self._held = ""
        self._started = False
        self.text = ""
        """Everything shown so far."""
        self.stopped = False
        """Whether a stop string came; what follows it is not shown."""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that may be shown now, perhaps none."""
        self._ids.append(token)
        known = self._decode(self._window, self._settled)
        text = self._decode(self._window, len(self._ids))
        if text.endswith(UNFINISHED) or len(text) <= len(known):
            return ""
        self._window, self._settled = self._settled, len(self._ids)
        return self._show(text[len(known) :], final=False)

    def flush(self) -> str:
        """The answer is over: what was held back, an unfinished character included."""
        known = self._decode(self._window, self._settled)
        text = self._decode(self._window, len(self._ids))
        self._window = self._settled = len(self._ids)
        return self._show(text[len(known) :], final=True)

    def _decode(self, first: int, last: int) -> str:
        return str(self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True))

    def _show(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        if new and not self._started:
            self._started = True
            new = new.removeprefix(" ")
        text = self._held + new
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = text[: min(found)], ""
        else:
            keep = 0 if final else self._stop_prefix(text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text

    def _stop_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
