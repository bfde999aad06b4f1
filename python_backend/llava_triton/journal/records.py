"""What the journal knows of a session: a log of records, each one step of the conversation.

    SESSION/records/00000001 ...    SESSION = SHA-256 of tenant and session ID
    SESSION/pictures/NAME ...       NAME = the digest of the picture's features

A record is JSON behind its checksum, and names the checksum of the record before it. It says how
many turns stay of what the records before say, and what follows them. So an answered question, one
answered again, a rewound session and a picture without a question are all records of one kind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from llava_triton.contract.sampling_parameters import Truncation
from llava_triton.conversation.prompt import CompletedTurn, Span

FORMAT = 1
MAX_RECORD_BYTES = 64 * 1024 * 1024
"""No conversation is as long; what is longer is not read."""
_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","record":', b"}\n"
_HEX = re.compile(r"[0-9a-f]{64}")
_RECORD_NAME = re.compile(r"[0-9]{8}")
_MOST = 2**53
"""No number of a record is larger."""


class DamagedError(Exception):
    """A record or a picture that is not what the journal wrote: damaged, cut off, another
    session's, or forged."""


def session_key(session_id: int | str, tenant: str) -> str:
    """The folder of a tenant's session: 64 hexadecimal digits, which do not show the ID."""
    kind = "int" if isinstance(session_id, int) else "str"
    named = json.dumps([tenant, kind, str(session_id)])
    return hashlib.sha256(named.encode()).hexdigest()


def record_path(key: str, number: int) -> str:
    """Where a session's record of this number lies; the first is 1."""
    return f"{key}/records/{number:08}"


def record_number(path: str) -> int | None:
    """The number of the record that lies there; None where it is none."""
    name = path.rpartition("/")[2]
    return int(name) if _RECORD_NAME.fullmatch(name) else None


def picture_path(key: str, name: str) -> str:
    """Where a session's picture lies."""
    return f"{key}/pictures/{name}"


def picture_object(item: bytes) -> bytes:
    """A picture as it lies in the store: its SHA-256, then what was sent."""
    return hashlib.sha256(item).digest() + item


def picture_of(data: bytes | None) -> bytes:
    """A picture as it was sent.

    Raises:
        DamagedError: it is not there, or another one.
    """
    if data is None:
        raise DamagedError("a picture is missing")
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise DamagedError("a picture is damaged")
    return data[32:]


@dataclass(frozen=True)
class Record:
    """One step of a session."""

    session: str
    """`session_key`."""
    tenant: str
    generation: str
    """One for each time the session was opened anew; resumed, it stays."""
    writer: str
    """Who wrote it: one for each time a server had the session."""
    checkpoint: str
    """Of the model whose tokens these are."""
    opened_at: float
    """Seconds since 1970, and so the others."""
    written_at: float
    expires_at: float
    """Nobody resumes the session from then on, unless a later record says so."""
    kept: int
    """Turns that stay of what the records before say."""
    tokens: Sequence[int]
    """All that follow the last one of these turns."""
    spans: Sequence[Span]
    """The pictures among them; positions are the conversation's."""
    turns: Sequence[CompletedTurn]
    """Those that end among them."""
    images: Sequence[str]
    """The names of all pictures that follow the last kept turn's; the last ones may have no
    tokens."""
    pending: int
    """Pictures that came without a question since the last answer."""
    text: str | None = None
    """What was asked, for people; an answer is in `turns`."""
    finish_reason: str = ""
    forgotten: int = 0
    """Turns that the session has forgotten, because its context was full."""
    truncation: Truncation = "disabled"
    """What becomes of it when its context is full again."""


@dataclass
class Conversation:
    """What the records of a session make together."""

    tokens: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    turns: list[CompletedTurn] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    pending: int = 0
    forgotten: int = 0
    truncation: Truncation = "disabled"

    def take(self, record: Record) -> None:
        """Go on with a record.

        Raises:
            DamagedError: it does not follow.
        """
        if record.kept > len(self.turns):
            raise DamagedError(f"it keeps {record.kept} turns of {len(self.turns)}")
        last = self.turns[record.kept - 1] if record.kept else None
        end, images = (last.end, last.images) if last else (0, 0)
        del self.turns[record.kept :], self.tokens[end:], self.images[images:]
        self.spans = [span for span in self.spans if span.end <= end]
        self.turns += record.turns
        self.tokens += record.tokens
        self.spans += record.spans
        self.images += record.images
        self.pending, self.forgotten = record.pending, record.forgotten
        self.truncation = record.truncation

    def check(self) -> None:
        """Raises DamagedError where no session could be so."""
        end = images = 0
        numbers = [-1, *(turn.number for turn in self.turns), len(self.turns) + self.forgotten]
        if numbers != sorted(set(numbers)):
            raise DamagedError("its turns are not counted as they were asked")
        for turn in self.turns:
            if not end <= turn.asked <= turn.end <= len(self.tokens):
                raise DamagedError("a turn does not end where its tokens do")
            if not images + turn.pending <= turn.images <= len(self.images):
                raise DamagedError("a turn speaks of pictures that are not there")
            end, images = turn.end, turn.images
        if len(self.spans) > len(self.images) or images + self.pending > len(self.images):
            raise DamagedError("it speaks of pictures that are not there")
        end = 0
        for span in self.spans:
            if span.length < 1 or not end <= span.start < span.end <= len(self.tokens):
                raise DamagedError("a picture does not stand among its tokens")
            end = span.end


def encode(record: Record, number: int, previous: str) -> bytes:
    """A record as it lies in the store.

    Args:
        record: the record.
        number: its place in the log.
        previous: the `checksum` of the one before it; "" where it is the first.
    """
    values = asdict(record) | {"format": FORMAT, "number": number, "previous": previous}
    values["spans"] = [[span.start, span.length] for span in record.spans]
    body = json.dumps(values, separators=(",", ":"), sort_keys=True).encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def checksum(data: bytes) -> str:
    """What the next record calls this one."""
    return data[len(_HEAD) : len(_HEAD) + 64].decode("ascii", "replace")


def decode(data: bytes, key: str, number: int) -> tuple[Record, str]:
    """Read a record, strictly.

    Args:
        data: as it lies in the store.
        key: the session's.
        number: its place in the log.

    Returns:
        The record, and the checksum of the one before it.

    Raises:
        DamagedError: it is not what was written there.
    """
    named = checksum(data)
    body = data[len(_HEAD) + 64 + len(_MIDDLE) : -len(_TAIL)]
    whole = _HEAD + named.encode() + _MIDDLE + body + _TAIL == data and _HEX.fullmatch(named)
    if not whole or len(data) > MAX_RECORD_BYTES:
        raise DamagedError(f"record {number} is cut off or no record")
    if hashlib.sha256(body).hexdigest() != named:
        raise DamagedError(f"record {number} is damaged")
    try:
        values = json.loads(body)
        return _record(values, key, number), _text(values["previous"])
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise DamagedError(f"record {number} is none of the journal's: {error}") from None


def _record(values: dict[str, Any], key: str, number: int) -> Record:
    if values["format"] != FORMAT:
        raise ValueError("another release has written it")
    if (values["session"], values["number"]) != (key, number):
        raise ValueError("it belongs elsewhere")
    return Record(
        session=key,
        tenant=_text(values["tenant"]),
        generation=_text(values["generation"]),
        writer=_text(values["writer"]),
        checkpoint=_text(values["checkpoint"]),
        opened_at=_seconds(values["opened_at"]),
        written_at=_seconds(values["written_at"]),
        expires_at=_seconds(values["expires_at"]),
        kept=_number(values["kept"]),
        tokens=[_number(each) for each in _list(values["tokens"])],
        spans=[Span(*map(_number, each)) for each in _list(values["spans"])],
        turns=[_turn(each) for each in _list(values["turns"])],
        images=[_name(each) for each in _list(values["images"])],
        pending=_number(values["pending"]),
        text=None if values["text"] is None else _text(values["text"]),
        finish_reason=_text(values["finish_reason"]),
        forgotten=_number(values["forgotten"]),
        truncation=_truncation(values["truncation"]),
    )


_NUMBERS = ("asked", "end", "images", "pending", "number")
"""Of a turn."""


def _turn(values: dict[str, Any]) -> CompletedTurn:
    numbers = {name: _number(values[name]) for name in _NUMBERS}
    return CompletedTurn(**numbers, answer=_text(values["answer"]))


def _truncation(value: Any) -> Truncation:
    if value not in get_args(Truncation):
        raise TypeError("a truncation is none")
    return "auto" if value == "auto" else "disabled"


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("a list is none")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise TypeError("a number is none")
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise TypeError("a time is none")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is none")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise TypeError("a picture's name is none")
    return value
