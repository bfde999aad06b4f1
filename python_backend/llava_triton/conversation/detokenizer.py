"""From token IDs to text that may be shown, token by token."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete or malformed UTF-8 sequence to."""
MAX_UNREADABLE_TOKENS = 8
"""A character has at most 4 bytes, so at most 4 tokens: more unreadable ones than this are
malformed, not incomplete."""


class Detokenizer:
    """The text of one answer as it grows.

    Pieces never hold a part of a character or of a stop string. All pieces together are what
    `tokenizer.decode(ids, skip_special_tokens=True)` gives, without one leading space (byte-level
    tokenizers decode an answer to " Red", SentencePiece ones to "Red") and cut before the first
    stop string. Only where a model emits malformed UTF-8 by SentencePiece's byte tokens may the
    number of replacement characters differ from it.

    A token costs the decoding of a few tokens, however long the answer is: the readable tokens
    before it are decoded once more together with it, because a token's text can depend on those
    (a leading space, a character of several tokens), and everything older is forgotten.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stop: strings that end the answer; none of them empty.
        min_tokens: in the text of so many tokens no stop string is looked for.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._invisible = {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._too_early = min_tokens
        """How many more tokens hold no stop string; below 0: this one may."""
        # Tokens [0, read) are decoded and give `before`; the rest cannot be read yet.
        self._ids: list[int] = []
        self._read = 0
        self._before = ""
        self._at_start = True
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.text = ""
        """Everything shown so far."""
        self.stopped = False
        """Whether a stop string was found; the text ends before it and no more will come."""

    def push(self, token_id: int) -> str:
        """The next token of the answer -> new text that may be shown, "" if there is none yet."""
        if self.stopped:
            return ""
        self._too_early -= 1
        if token_id in self._invisible:
            return ""
        self._ids.append(token_id)
        return self._show(self._readable_text())

    def is_invisible(self, token_id: int) -> bool:
        """Whether a token has no text: special ones have none."""
        return token_id in self._invisible

    def flush(self) -> str:
        """The answer is complete -> the text held back until now."""
        if self.stopped:
            return ""
        text = self._show(self._take(len(self._ids)))
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        self.text += rest
        return text + rest

    def _readable_text(self) -> str:
        """Text of the tokens that became readable with the last one."""
        end = len(self._ids)
        if not self._decode(0, end).endswith(REPLACEMENT):
            return self._take(end)
        if end - self._read > MAX_UNREADABLE_TOKENS:
            # Some of it is malformed for good. It may be cut where no character spans the cut;
            # the last tokens may yet become a character.
            whole = self._decode(self._read, end)
            for cut in range(end - 3, end - MAX_UNREADABLE_TOKENS, -1):
                if self._decode(self._read, cut) + self._decode(cut, end) == whole:
                    return self._take(cut)
            # It spoils what is around it, too; the more there is of it, the longer it takes.
            return self._take(end - 3)
        return ""

    def _take(self, end: int) -> str:
        """Text of the tokens [read, end), which count as read from now on."""
        text = self._decode(0, end)
        if text.startswith(self._before):
            text = text[len(self._before) :]
        else:  # a malformed byte token spoils, in SentencePiece, the byte tokens before it, too
            text = self._decode(self._read, end)
        if text:
            del self._ids[: self._read]
            self._read = end - self._read
            self._before = self._decode(0, self._read)
        return text

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _show(self, text: str) -> str:
        """New text of the answer -> what of it, and of the text held back, may be shown now."""
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix(" ")
        if self._too_early >= 0:
            self.text += text
            return text
        pending = self._held + text
        found = [index for index in (pending.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped = True
            shown, self._held = pending[: min(found)], ""
        else:
            held = max((_overlap(pending, stop) for stop in self._stop), default=0)
            shown, self._held = pending[: len(pending) - held], pending[len(pending) - held :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
