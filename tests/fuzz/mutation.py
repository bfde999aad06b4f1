"""Inputs that are nearly right, without a library: for the short form."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

PIECES = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"null",
    b"[]",
    b"{}",
]
PIECES += [
    b'"',
    b"\\u",
    b"\\ud800",
    b"[" * 200,
    b"\n\n",
    b": ",
    b",",
    b"true",
    b"<image>",
    b"\0" * 64,
]


def mutations(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """So many, the same each time: bytes changed, cut, doubled, put in, and two inputs crossed."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randint(0, len(data))
            end = min(len(data), at + chance.choice((1, 1, 2, 8, 64)))
            match chance.randint(0, 5):
                case 0:
                    data[at:end] = chance.randbytes(end - at)
                case 1:
                    del data[at:end]
                case 2:
                    data[at:at] = data[at:end]
                case 3:
                    data[at:end] = chance.choice(PIECES)
                case 4:
                    data[at:at] = chance.choice(PIECES)
                case 5:
                    other = chance.choice(seeds)
                    data[at:] = other[chance.randint(0, len(other)) :]
        yield bytes(data)
