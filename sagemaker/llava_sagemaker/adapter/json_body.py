"""The JSON of a request's body, whose cost is known before it is parsed.

What a client may send is large only because of its pictures. So long strings are taken out of a
large body first, and what is left is bounded: in bytes by what texts may take, and in marks (see
MOST_MARKS), because each costs a hundred times its byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_sagemaker.adapter.off_loop import LARGE_BYTES, off_loop

MOST_MARKS = 110_000
"""Brackets, commas, colons and strings of a body, commas inside of strings aside: so many are
parsed in 10 to 20 ms. The longest conversations that a model could read have some ten thousand."""
TEXTS = 8
"""A body may have as many bytes besides its long strings as so many of the longest texts: texts
with all their characters escaped, small pictures, spaces."""
LONG_BYTES = 8 * 1024
"""A string of a large body is long that has more."""
PIECE_BYTES = 512 * 1024
"""A long string is read in pieces of this size."""
_MARK_BYTES = 100
"""Of memory for each mark, at most: an object with one name takes 232."""
_MOST_CHARACTER_BYTES = 4
"""One character outside Unicode's first plane makes all of a string so wide."""
_MARKS = b"[]{},:"
_MARKS_AND_CONSTANTS = _MARKS + b"NI"
_OTHERS = bytes(set(range(256)) - set(_MARKS_AND_CONSTANTS))
_LONGEST_ESCAPE = 6
_MOST_TRIES = 1000


@dataclass(frozen=True, repr=False)
class LongString:
    """A string that is longer than a text may be, all ASCII: a picture, or nothing that is taken.

    Never in one piece: copying 40 MB at once would hold the interpreter's lock for too long.
    """

    pieces: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(len, self.pieces))

    def __repr__(self) -> str:
        return f"<{self.size} bytes>"


@dataclass(frozen=True)
class _Outline:
    """A body that may be parsed."""

    rest: bytes
    """The JSON, with NaN where a long string was: no other place of it has that."""
    long: tuple[LongString, ...]
    marks: int

    @property
    def parsed_bytes(self) -> int:
        """Memory that its parsed form takes at most, besides its long strings."""
        plain = self.rest.isascii() and b"\\" not in self.rest
        width = 1 if plain else _MOST_CHARACTER_BYTES
        return width * len(self.rest) + self.marks * _MARK_BYTES


class JsonReader:
    """Reads JSON objects.

    Args:
        max_text_bytes: longer strings become LongString.
    """

    def __init__(self, max_text_bytes: int) -> None:
        self._max_text = max_text_bytes

    async def outline(self, body: bytes) -> _Outline:
        """A body, as far as is needed to say what parsing it takes.

        Raises:
            AdapterError: invalid_request, it has too much besides its long strings.
        """
        return await off_loop(len(body), self._outline, body)

    async def object(self, outline: _Outline) -> dict[str, Any]:
        """The JSON object of a body.

        Raises:
            AdapterError: invalid_request, it is something else.
        """
        return await off_loop(len(outline.rest), self._object, outline)

    def _object(self, outline: _Outline) -> dict[str, Any]:
        long = iter(outline.long)

        def constant(name: str) -> Any:
            string = next(long, None)
            if string is None:
                raise ValueError(f"{name} is no JSON number")
            if string.size > self._max_text:
                return string
            return b"".join(string.pieces).decode()

        try:
            value = json.loads(outline.rest, parse_constant=constant)
        except (ValueError, RecursionError) as error:
            raise _invalid(str(error)) from None
        if not isinstance(value, dict):
            raise invalid_request(f"the body is JSON, but no object ({type(value).__name__})")
        return value

    def _outline(self, body: bytes) -> _Outline:
        if len(body) <= LARGE_BYTES:
            # Also those in strings: a body of this size cannot have too many.
            return _Outline(body, (), sum(map(body.count, (b"[", b"{", b",", b":"))))
        encoding = json.detect_encoding(body)
        if not encoding.startswith("utf-8"):
            try:
                body = body.decode(encoding, "surrogatepass").encode(errors="surrogatepass")
            except ValueError as error:
                raise _invalid(str(error)) from None
        return self._scan(body)

    def _scan(self, body: bytes) -> _Outline:
        most_rest = TEXTS * self._max_text
        # One by one they would take seconds; a text's own are escaped.
        quotes = 0
        for start in range(0, len(body), PIECE_BYTES):
            quotes += body.count(b'"', start, start + PIECE_BYTES)
            if quotes > 2 * MOST_MARKS + 2 * self._max_text:
                raise _too_many()
        long: list[LongString] = []
        rest: list[bytes] = []
        rest_bytes = copied = position = marks = 0
        constants = False
        while position < len(body):
            opening = body.find(b'"', position)
            gap_end = opening if opening >= 0 else len(body)
            if gap_end - position > most_rest:
                raise self._too_much(gap_end - position)
            found = body[position:gap_end].translate(None, _OTHERS)
            marks += len(found) + 1
            constants = constants or b"N" in found or b"I" in found
            if marks > MOST_MARKS:
                raise _too_many()
            if opening < 0:
                break
            closing = body.find(b'"', opening + 1)
            while closing >= 0 and _is_escaped(body, opening + 1, closing):
                closing = body.find(b'"', closing + 1)
            if closing < 0:
                break  # json says what is missing
            position = closing + 1
            if closing - opening > LONG_BYTES:
                string = _long_string(body, opening + 1, closing)
                if string is not None:
                    rest += (body[copied:opening], b"NaN")
                    rest_bytes += opening - copied
                    copied = position
                    long.append(string)
            if rest_bytes + position - copied > most_rest:
                raise self._too_much(rest_bytes + position - copied)
        if rest_bytes + len(body) - copied > most_rest:
            raise self._too_much(rest_bytes + len(body) - copied)
        if constants and long:
            raise _invalid("NaN and Infinity are no JSON numbers")
        rest.append(body[copied:])
        return _Outline(b"".join(rest), tuple(long), marks)

    def _too_much(self, size: int) -> AdapterError:
        return invalid_request(
            f"the body has {size} bytes or more besides its pictures; it may have "
            f"{TEXTS * self._max_text}: shorten the texts"
        )


def beginning(string: str | LongString) -> str:
    """Its first 16 characters."""
    return string[:16] if isinstance(string, str) else string.pieces[0][:16].decode()


def too_long(name: str, text: LongString) -> AdapterError:
    """What should be a text is too long for one."""
    return invalid_request(f"{name} is {text.size} bytes long; shorten it")


def _too_many() -> AdapterError:
    return invalid_request(
        f"the body's JSON has more than {MOST_MARKS} brackets, commas, colons and strings, or far "
        "too many quotation marks; send fewer messages at once"
    )


def _invalid(fault: str) -> AdapterError:
    return invalid_request(f"the body is not valid JSON ({fault}); send one object")


def _is_escaped(body: bytes, start: int, at: int) -> bool:
    """Whether an odd number of backslashes stands before `at`, in the string that begins at
    `start`."""
    if at == start or body[at - 1] != 0x5C:
        return False
    window = 16
    while True:
        before = body[max(start, at - window) : at]
        backslashes = len(before) - len(before.rstrip(b"\\"))
        if backslashes < len(before) or at - window <= start:
            return backslashes % 2 == 1
        window *= 2


def _long_string(body: bytes, start: int, end: int) -> LongString | None:
    """The string between two quotation marks; None where it is no picture: not ASCII, or wrong."""
    pieces = []
    while start < end:
        stop = _cut(body, start, end)
        if stop == start:
            return None
        try:
            text: str = json.loads('"' + body[start:stop].decode("ascii") + '"')
        except ValueError:
            return None
        if not text.isascii():
            return None
        pieces.append(text.encode())
        start = stop
    return LongString(tuple(pieces))


def _cut(body: bytes, start: int, end: int) -> int:
    """Where the piece that begins at `start` may end: no escape reaches over that. `start` itself,
    where there is hardly anything but escapes."""
    stop = start + PIECE_BYTES
    if stop >= end:
        return end
    for _ in range(_MOST_TRIES):
        escape = body.rfind(b"\\", max(start, stop - _LONGEST_ESCAPE), stop)
        if escape < 0:
            return stop
        stop = escape
    return start
