"""A session as the journal has it; and what nobody will ask for any more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llava_triton.journal.records import (
    Conversation,
    DamagedError,
    Record,
    checksum,
    decode,
    picture_of,
    picture_path,
    record_number,
    record_path,
)
from llava_triton.journal.store import Store


@dataclass(frozen=True)
class Journaled:
    """A session that can be resumed."""

    conversation: Conversation
    last: Record
    """Its last record."""
    number: int
    """Of that."""
    previous: str
    """Its checksum."""


async def read_session(store: Store, key: str, now: float) -> Journaled | None:
    """Read a session's log; None where there is none, or nobody may resume it any more.

    Args:
        store: the journal.
        key: the session's.
        now: seconds since 1970.

    Raises:
        DamagedError: the log is not what was written.
        StoreError: the store does not answer.
    """
    entries = await store.entries(f"{key}/records")
    numbers = [number for each in entries if (number := record_number(each.path)) is not None]
    if 1 not in numbers:
        return None  # or what is left of one that is being deleted
    found = await store.read_all(record_path(key, number) for number in numbers)
    conversation, last, previous = Conversation(), None, ""
    for expected, (number, data) in enumerate(zip(numbers, found, strict=True), 1):
        if data is None:
            return None  # it is being deleted
        record, before = decode(data, key, number)
        if last is not None and record.generation != last.generation:
            # Written late by a server that had lost the session: not a part of it.
            numbers = numbers[: expected - 1]
            break
        if number != expected:
            raise DamagedError(f"record {expected} is missing")
        if before != previous:
            raise DamagedError(f"record {number} does not follow the one before it")
        conversation.take(record)
        last, previous = record, checksum(data)
    conversation.check()
    if last is None or last.expires_at <= now:
        return None
    return Journaled(conversation, last, len(numbers), previous)


async def read_pictures(store: Store, key: str, names: Collection[str]) -> dict[str, bytes]:
    """Pictures of a session as they were sent, by name.

    Raises:
        DamagedError: one is missing, or not what was written.
        StoreError: the store does not answer.
    """
    distinct = list(dict.fromkeys(names))
    found = await store.read_all(picture_path(key, name) for name in distinct)
    return {name: picture_of(data) for name, data in zip(distinct, found, strict=True)}


async def sweep(store: Store, older_than: float, but: Collection[str]) -> int:
    """Delete the sessions to which nothing was added for long: their servers have died.

    Args:
        store: the journal.
        older_than: seconds since 1970.
        but: keys of sessions that are open here.

    Returns:
        How many.
    """
    swept = 0
    for key in await store.folders():
        if key in but:
            continue
        entries = await store.entries(key)
        if entries and max(each.written_at for each in entries) < older_than:
            await store.delete([each.path for each in entries])
            swept += 1
    return swept
