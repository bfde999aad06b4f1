"""The journal by itself: records, their writer, and what reads them back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from llava_triton.contract.settings import Settings
from llava_triton.conversation.prompt import CompletedTurn, Span
from llava_triton.journal import writer as writer_module
from llava_triton.journal.background import Background
from llava_triton.journal.pictures import PictureWriter
from llava_triton.journal.reading import read_pictures, read_session, sweep
from llava_triton.journal.records import (
    Conversation,
    DamagedError,
    Record,
    checksum,
    decode,
    encode,
    picture_path,
    record_path,
    session_key,
)
from llava_triton.journal.store import Store, StoreError
from llava_triton.journal.writer import ElsewhereError, Log, Writer
from tests.properties import given

PATIENCE_SECONDS = 60.0
KEY = session_key("s", "")
NAME = "ab" * 32
RECORD = Record(
    session=KEY,
    tenant="",
    generation="g",
    writer="w",
    checkpoint="c",
    opened_at=10.0,
    written_at=11.0,
    expires_at=12.0,
    kept=0,
    tokens=[1, 5, 5, 5, 2],
    spans=[Span(1, 3)],
    turns=[CompletedTurn(asked=4, end=5, images=1, pending=0, answer="ä \ud83d", number=0)],
    images=[NAME],
    pending=0,
    text="what?",
    finish_reason="stop",
)


def forged(data: bytes, old: bytes, new: bytes) -> bytes:
    """A record that somebody has changed, and its checksum with it."""
    body = data[len(b'{"sha256":"') + 64 + len(b'","record":') : -2]
    assert old in body
    body = body.replace(old, new)
    return b'{"sha256":"%s","record":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def test_a_key_shows_neither_session_nor_tenant_and_mixes_up_none() -> None:
    ids: list[tuple[int | str, str]] = [(7, ""), ("7", ""), ("7", "a"), ("", "7"), ("a", "7")]
    keys = {session_key(*each) for each in ids}
    assert len(keys) == len(ids)
    assert all(len(key) == 64 for key in keys)


def test_a_record_is_read_as_it_was_written() -> None:
    data = encode(RECORD, 3, "before")
    assert decode(data, KEY, 3) == (RECORD, "before")
    assert checksum(data) in data.decode()


@given(st.data())
def test_a_record_that_is_cut_or_changed_anywhere_is_none(data: st.DataObject) -> None:
    whole = encode(RECORD, 1, "")
    with pytest.raises(DamagedError, match="record 1"):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))], KEY, 1)
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    with pytest.raises(DamagedError, match="record 1"):
        decode(bytes(changed), KEY, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"tokens":[1,5,5,5,2]', b'"tokens":[1,-5]'),
        (b'"tokens":[1,5,5,5,2]', b'"tokens":[true]'),
        (b'"tokens":[1,5,5,5,2]', b'"tokens":[1e400]'),
        (b'"tokens":[1,5,5,5,2]', b'"tokens":' + b"[" * 100_000 + b"]" * 100_000),
        (b'"spans":[[1,3]]', b'"spans":[[1,3,3]]'),
        (b'"spans":[[1,3]]', b'"spans":7'),
        (b'"kept":0', b'"kept":"0"'),
        (b'"kept":0,', b""),
        (b'"format":1', b'"format":2'),
        (b'"number":1', b'"number":2'),
        (b'"images":["ab', b'"images":["../'),
        (b'"expires_at":12.0', b'"expires_at":NaN'),
        (b'"turns":[{', b'"turns":["'),
        (b'{"checkpoint"', b'[{"checkpoint"'),
        (KEY.encode(), session_key("t", "").encode()),
    ],
)
def test_a_forged_record_is_none(old: bytes, new: bytes) -> None:
    with pytest.raises(DamagedError, match="record 1"):
        decode(forged(encode(RECORD, 1, ""), old, new), KEY, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [1]},
        {"spans": [Span(1, 0)]},
        {"spans": [Span(1, 3), Span(2, 1)]},
        {"spans": [Span(1, 1), Span(3, 1)]},
        {"images": []},
        {"pending": 1},
        {"turns": [replace(RECORD.turns[0], asked=6)]},
        {"turns": [replace(RECORD.turns[0], end=9)]},
        {"turns": [replace(RECORD.turns[0], pending=2)]},
        {"turns": [RECORD.turns[0], RECORD.turns[0]]},
    ],
)
def test_what_no_session_could_be_is_damaged(changes: dict[str, Any]) -> None:
    conversation = Conversation()
    conversation.take(replace(RECORD, **changes))
    with pytest.raises(DamagedError):
        conversation.check()


def test_a_record_cannot_keep_turns_that_never_were() -> None:
    with pytest.raises(DamagedError, match="keeps 1 turns of 0"):
        Conversation().take(replace(RECORD, kept=1))


@pytest.mark.parametrize("journal", ["/a/folder", "file://a/folder", "http://x", "s3:/x", 7])
def test_a_journal_that_is_none_is_refused(journal: Any) -> None:
    with pytest.raises(ValueError, match="setting journal is"):
        Settings(journal=journal)
    with pytest.raises(ValueError, match="journal is empty"):
        Settings(journal_sync=True)


# Writing.


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background("test")
    yield background
    background.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store((tmp_path / "a journal").as_uri())


class Hands:
    """A session's log, written and read by hand."""

    def __init__(self, store: Store, background: Background) -> None:
        self.store, self.background = store, background
        self.writer = Writer(store, background)
        self.pictures = PictureWriter(store, background)

    def write(self, log: Log, **changes: Any) -> Exception | None:
        """Write a record, and wait for it; what went wrong."""
        told: list[Exception | None] = []
        values = {"writer": log.writer, "generation": log.generation, **changes}
        covers = values.pop("covers", None)
        self.writer.append(log, replace(RECORD, **values), covers, told.append)
        self.until(lambda: told)
        return told[0]

    def until(self, holds: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < until, "it never came true"
            time.sleep(0.002)

    def read(self, key: str = KEY, now: float = 0.0) -> Any:
        return self.background.run(read_session(self.store, key, now)).result()

    def paths(self) -> list[str]:
        return [each.path for each in self.background.run(self.store.entries("")).result()]


@pytest.fixture
def hands(store: Store, background: Background) -> Hands:
    return Hands(store, background)


NEXT = {"kept": 1, "tokens": [3, 4], "spans": [], "images": []}
NEXT["turns"] = [CompletedTurn(asked=6, end=7, images=1, pending=0, answer="yes", number=1)]


def test_a_log_is_read_as_it_was_written(hands: Hands) -> None:
    log = Log(KEY)
    hands.pictures.keep(KEY, NAME, b"a picture")
    assert hands.write(log) is None
    assert hands.write(log, **NEXT) is None
    assert log.is_safe
    found = hands.read()
    assert found.conversation.tokens == [1, 5, 5, 5, 2, 3, 4]
    assert [turn.answer for turn in found.conversation.turns] == [RECORD.turns[0].answer, "yes"]
    assert (found.number, found.previous) == (2, log.previous)
    assert hands.read(now=11.9) is not None
    assert hands.read(now=12.0) is None
    pictures = hands.background.run(read_pictures(hands.store, KEY, [NAME, NAME])).result()
    assert pictures == {NAME: b"a picture"}
    hands.writer.forget(log, time.time())
    hands.until(lambda: not hands.paths())
    assert hands.read() is None


def test_a_picture_that_does_not_come_keeps_its_record_out(
    hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "PICTURE_SECONDS", 0.1)
    log = Log(KEY)
    assert "picture was not written" in str(hands.write(log))
    assert (log.behind, hands.paths()) == (True, [])
    # Nothing is written behind a gap, but what has the whole session.
    hands.pictures.keep(KEY, NAME, b"a picture")
    assert isinstance(hands.write(log, **NEXT), StoreError)
    assert hands.write(log, covers=log.dropped) is None
    assert log.is_safe
    assert hands.writer.counters.dropped == 2


def test_only_one_record_waits_for_a_picture_that_does_not_come(hands: Hands) -> None:
    log = Log(KEY)
    hands.writer.counters.retries = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer_module, "SYNC_SECONDS", 0.1)  # it is not waited for any longer
        assert "picture was not written" in str(hands.write(log))
    for _ in range(3):  # of `PICTURE_SECONDS` each
        assert "picture was not written" in str(hands.write(log, covers=log.dropped))
    hands.pictures.keep(KEY, NAME, b"a picture")
    hands.until(lambda: hands.paths())
    assert hands.write(log, covers=log.dropped) is None
    assert log.is_safe


def test_of_two_writers_the_second_loses(hands: Hands) -> None:
    one = Log(KEY)
    assert hands.write(one, images=[], spans=[], turns=[]) is None
    other = Log(KEY, generation=one.generation, number=1, previous=one.previous)
    assert hands.write(other, images=[], spans=[], turns=[]) is None
    assert isinstance(hands.write(one, images=[], spans=[], turns=[]), ElsewhereError)
    assert (one.elsewhere, other.elsewhere) == (True, False)
    assert isinstance(hands.write(one, images=[], spans=[], turns=[]), ElsewhereError)
    assert hands.read().previous == other.previous
    assert hands.writer.counters.elsewhere == 1


def test_a_try_whose_answer_was_lost_is_no_other_writer(
    hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, tries = Store.create, []

    async def lost(self: Store, path: str, data: bytes) -> bool:
        created = await create(self, path, data)
        tries.append(created)
        if len(tries) == 1:
            raise StoreError("the connection broke")
        return created

    monkeypatch.setattr(Store, "create", lost)
    log = Log(KEY)
    assert hands.write(log, images=[], spans=[], turns=[]) is None
    assert (tries, log.number, hands.writer.counters.retries) == ([True, False], 1, 1)
    assert hands.write(log, images=[], spans=[], turns=[]) is None
    assert hands.read().number == 2


def test_a_session_opened_anew_takes_the_place_of_another_one(hands: Hands) -> None:
    nothing: dict[str, Any] = {"images": [], "spans": [], "turns": []}
    old, new = Log(KEY), Log(KEY)
    for _ in range(3):
        assert hands.write(old, **nothing) is None
    assert hands.write(new, **nothing) is None
    assert hands.paths() == [record_path(KEY, 1)]
    # The old one's server writes once more; nobody takes that for the new one's.
    late = Log(KEY, generation=old.generation, number=1, previous=old.previous)
    assert hands.write(late, **nothing) is None
    assert hands.read().number == 1
    assert hands.write(new, **nothing) is None
    assert hands.read().last.generation == new.generation
    assert isinstance(hands.write(late, **nothing), type(None))
    assert hands.read().number == 2


def test_a_session_that_ends_takes_no_picture_of_the_next_one(hands: Hands) -> None:
    """A client that does not wait for the end may have shown some already."""
    log = Log(KEY)
    hands.pictures.keep(KEY, NAME, b"a picture")
    assert hands.write(log) is None
    asked_at = time.time()
    hands.until(lambda: time.time() > asked_at + 0.02)
    later = picture_path(KEY, "cd" * 32)
    hands.background.run(hands.store.replace(later, b"of the next")).result()
    hands.writer.forget(log, asked_at)
    hands.until(lambda: len(hands.paths()) == 1)
    assert hands.paths() == [later]


def test_what_waits_to_be_deleted_is_bounded(
    hands: Hands, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nothing: dict[str, Any] = {"images": [], "spans": [], "turns": []}
    logs = [Log(session_key(name, "")) for name in "abcd"]
    for log in logs:
        assert hands.write(log, session=log.key, **nothing) is None
    entries, down = Store.entries, [True]

    async def faulty(self: Store, prefix: str) -> Any:
        if down and prefix:
            raise StoreError("down")
        return await entries(self, prefix)

    monkeypatch.setattr(Store, "entries", faulty)
    monkeypatch.setattr(writer_module, "MOST_WAITING", 2)
    for log in logs:
        hands.writer.forget(log, time.time())
    assert caplog.text.count("stays in the journal") == 2
    down.clear()
    hands.until(lambda: len(hands.paths()) == 2)
    hands.writer.flush().result(PATIENCE_SECONDS)
    hands.writer.forget(logs[2], time.time())
    hands.until(lambda: len(hands.paths()) == 1)


def test_a_deletion_that_is_tried_again_spares_what_was_opened_anew(
    hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: dict[str, Any] = {"images": [], "spans": [], "turns": []}
    old, new, before = Log(KEY), Log(KEY), Log(KEY)
    assert hands.write(old, **nothing) is None
    delete, down = Store.delete, [True]

    async def faulty(self: Store, paths: Any) -> None:
        if down and self is hands.store:
            raise StoreError("down")
        await delete(self, paths)

    monkeypatch.setattr(Store, "delete", faulty)
    hands.writer.forget(old, time.time())
    hands.until(lambda: hands.writer.counters.retries)
    elsewhere = Hands(Store(hands.store.url), hands.background)
    assert elsewhere.write(new, **nothing) is None
    down.clear()
    hands.writer.flush().result(PATIENCE_SECONDS)
    assert hands.read().last.generation == new.generation
    # What took its place here, and ended before it was written, takes it along.
    before.replaces = frozenset({new.generation})
    hands.writer.forget(before, time.time())
    hands.until(lambda: not hands.paths())


def test_pictures_of_no_session_go_and_those_of_any_session_stay(
    hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "TIDY_SECONDS", 0.1)
    log, newer, nobodys = Log(KEY), session_key("newer", ""), session_key("nobody's", "")
    for key in (KEY, newer, nobodys):
        hands.pictures.keep(key, NAME, b"a picture")
    assert hands.write(log) is None
    data = forged(encode(replace(RECORD, session=newer), 1, ""), b'"format":1', b'"format":2')
    hands.background.run(hands.store.replace(record_path(newer, 1), data)).result()
    stay = {path for path in hands.paths() if not path.startswith(nobodys)}
    assert len(stay) >= 3
    for number in range(3):  # one after the other, also while the last one is waited for
        hands.pictures.keep(nobodys, f"{number:064}", b"a picture")
        for key in (KEY, newer, nobodys):
            hands.writer.tidy(key)
    hands.until(lambda: not hands.writer.tidying)
    hands.writer.flush().result(PATIENCE_SECONDS)
    hands.until(lambda: not any(path.startswith(nobodys) for path in hands.paths()))
    assert stay <= set(hands.paths())
    assert hands.read() is not None


def test_what_takes_a_place_keeps_what_it_has_shown_since(hands: Hands) -> None:
    old, seen = Log(KEY), "ef" * 32
    for name in (NAME, seen):
        hands.pictures.keep(KEY, name, b"a picture")
    assert hands.write(old, images=[NAME]) is None
    assert hands.write(old, images=[NAME, seen]) is None
    until = time.time() + 0.1
    hands.until(lambda: time.time() > until)
    new = Log(KEY)
    later = picture_path(KEY, "cd" * 32)
    hands.background.run(hands.store.replace(later, b"of its second turn")).result()
    assert hands.write(new, images=[NAME]) is None
    assert set(hands.paths()) == {later, picture_path(KEY, NAME), record_path(KEY, 1)}


def test_pictures_that_the_store_does_not_take_are_given_up(
    hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(self: Store, path: str, data: bytes) -> None:
        raise StoreError("no space left on the device")

    async def no_pause(_: float) -> None:
        pass

    monkeypatch.setattr(Store, "replace", down)
    monkeypatch.setattr(asyncio, "sleep", no_pause)
    hands.pictures.keep(KEY, NAME, b"a picture")
    hands.until(lambda: hands.pictures.dropped)
    monkeypatch.setattr("llava_triton.journal.pictures.MOST_BYTES", 3)
    hands.pictures.keep(KEY, NAME, b"a picture")
    assert (hands.pictures.written, hands.pictures.dropped) == (0, 2)


def test_what_dead_servers_left_is_swept(hands: Hands, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"images": [], "spans": [], "turns": []}
    for name in ("old", "open", "new"):
        log = Log(session_key(name, ""))
        assert hands.write(log, session=log.key, **nothing) is None
    now = time.time()
    for name in ("old", "open"):
        record = tmp_path / "a journal" / record_path(session_key(name, ""), 1)
        os.utime(record, (now - 100.0, now - 100.0))
    swept = sweep(hands.store, now - 50.0, {session_key("open", "")})
    assert hands.background.run(swept).result() == 1
    assert session_key("old", "") not in "".join(hands.paths())
    assert len(hands.paths()) == 2


def test_a_store_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(StoreError, match=r"the journal file:///.* cannot be used"):
        Store((tmp_path / "a file" / "folder").as_uri())
