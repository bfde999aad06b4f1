"""Bodies that come with `Content-Encoding: gzip`."""

from __future__ import annotations

import zlib

from llava_sagemaker.adapter.errors import AdapterError, invalid_request

PIECE_BYTES = 256 * 1024
"""Unpacked at once: a thousandth of it, packed, can become so much."""
_GZIP = 16 + zlib.MAX_WBITS


class Gunzip:
    """Unpacks a stream, step by step."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP)

    def step(self, packed: bytes) -> tuple[bytes, bytes | None]:
        """The next bytes, PIECE_BYTES at most, and what of `packed` is for the next step; None
        where all is done.

        Raises:
            AdapterError: invalid_request, it is no gzip.
        """
        if self._member.eof and packed:
            self._member = zlib.decompressobj(_GZIP)  # a file may have several, one after another
        try:
            unpacked = self._member.decompress(packed, PIECE_BYTES)
        except zlib.error as error:
            raise invalid_request(f"the body is not gzip, as it says ({error})") from None
        left = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        # A full piece: the unpacker itself may have more.
        more = left or (len(unpacked) == PIECE_BYTES and not self._member.eof)
        return unpacked, left if more else None

    def end(self) -> None:
        """All has come.

        Raises:
            AdapterError: invalid_request, more should have.
        """
        if not self._member.eof:
            raise invalid_request("the body's gzip is cut off")


def unpacker(encoding: str) -> Gunzip | None:
    """What unpacks a body with this header `Content-Encoding`; None for one that is not packed.

    Raises:
        AdapterError: 415, nothing does.
    """
    match encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return Gunzip()
    raise AdapterError(
        415,
        "invalid_request",
        f"the content encoding is {encoding[:80]!r}; send the body as it is, or with gzip",
    )
