"""Records on their way to the store: behind the answers, in order, and only where they are free."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llava_triton.journal.background import Background
from llava_triton.journal.records import (
    DamagedError,
    Record,
    checksum,
    decode,
    encode,
    picture_path,
    record_number,
    record_path,
)
from llava_triton.journal.store import Entry, Store, StoreError

log = logging.getLogger(__name__)

MOST_WAITING = 4096
"""Records that wait to be written. Where there are more, the store is too slow or down: sessions
that go on meanwhile are written as a whole, once there is room. And sessions that wait to be
deleted: beyond that, they are left to their expiry and to whoever sweeps."""
PICTURE_SECONDS = 30.0
"""So long a record waits for its pictures, which another process writes."""
SYNC_SECONDS = 10.0
"""So long an answer waits for its record, with `journal_sync`."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
"""Seconds between two tries."""
UNCERTAIN_SECONDS = 0.05
"""By so much the times of files may be behind the clock."""
TIDY_SECONDS, MOST_TO_TIDY = 600.0, 65536
"""So long after a session has ended, or a turn was refused, pictures are looked for that came late
or in vain; and of so many sessions at a time. A session that was opened under that ID meanwhile, on
any server, has had the time to write its first record, and keeps them."""
FLUSH_SECONDS = 8.0
"""So long the end of a server waits for what is not written yet."""

Done = Callable[[Exception | None], None]
"""Hears that a record is safe (None), or why it is not. Called on the writer's thread."""


class ElsewhereError(Exception):
    """Another server has gone on with the session."""


@dataclass
class JournalCounters:
    """Counts since the server started."""

    written: int = 0
    """Records."""
    dropped: int = 0
    """Records that were not written; their sessions are written as a whole later."""
    elsewhere: int = 0
    """Sessions that another server has gone on with."""
    retries: int = 0
    """Calls of the store that failed and were done again."""
    waiting: int = 0
    """Records that are not written yet."""
    resumed: int = 0
    """Sessions that were brought back."""
    hibernated: int = 0
    """Sessions that left the memory for others."""


@dataclass(eq=False)
class Log:
    """The log of one open session, as its server writes it."""

    key: str
    generation: str = field(default_factory=lambda: uuid.uuid4().hex)
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)
    opened_at: float = field(default_factory=time.time)
    asked_at: float = field(default_factory=time.time)
    """When its opening was asked for: what was shown later is no other session's."""
    told_at: float | None = None
    """When its last record was handed over; None: there is none."""
    source: Log | None = None
    """Of the session that it was forked from, which has its first pictures."""
    replaces: frozenset[str] = frozenset()
    """Generations of the sessions of its ID whose place it took."""
    number: int = 0
    """Of the last record that is safe. The writer's thread writes this and all that follow."""
    previous: str = ""
    """Its checksum."""
    pictures: set[str] = field(default_factory=set)
    """Names of those that are in the store."""
    missing: set[str] = field(default_factory=set)
    """Names of those that did not come in time: no record waits for them again."""
    dropped: int = 0
    """Records that were not written."""
    covered: int = 0
    """How many of these a record of the whole session, which was written later, makes up for."""
    elsewhere: bool = False
    """Whether another server has gone on with the session."""
    waiting: int = 0
    """Records on their way."""
    copying: int = 0
    """Forks that still need pictures of it."""

    @property
    def behind(self) -> bool:
        """Whether the next record has to have the whole session."""
        return self.dropped > self.covered

    @property
    def is_safe(self) -> bool:
        """Whether all that was said can be resumed."""
        return self.number > 0 and not (self.waiting or self.behind or self.elsewhere)


@dataclass
class _Append:
    log: Log
    record: Record
    covers: int | None
    done: Done | None
    tried_since: float = field(default_factory=time.monotonic)


@dataclass
class _Forget:
    log: Log
    at: float
    """When its end was asked for, in seconds since 1970: what was shown later is another
    session's."""
    expired: bool
    """Whether nobody ended it."""


class Writer:
    """Writes the logs of many sessions, each in order, all beside one another.

    Args:
        store: where to.
        background: the event loop that waits for it.
        is_open: whether a session of this key is open here; for any thread.
    """

    def __init__(
        self, store: Store, background: Background, is_open: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.counters = JournalCounters()
        self._is_open = is_open
        self._store = store
        self._background = background
        self._lock = threading.Lock()
        """Guards the counts of logs and of all."""
        self._queues: dict[str, deque[_Append | _Forget]] = {}
        """By session, what is to be done; the loop's thread alone touches it."""
        self._to_tidy: dict[str, float] = {}
        """Sessions whose pictures are looked for soon, and up to when the last ones may come; the
        loop's thread alone touches it."""
        self._forgets = 0
        """Sessions that wait to be deleted."""
        self._tasks: dict[str, asyncio.Future[None]] = {}
        """What works on each queue. (An event loop keeps no task alive by itself.)"""
        self._idle = asyncio.Event()
        self._idle.set()

    def append(
        self, log: Log, record: Record, covers: int | None = None, done: Done | None = None
    ) -> None:
        """Write a record behind a log's others; from any thread, at once.

        Args:
            log: the session's.
            record: what to write.
            covers: where it has the whole session, `log.dropped` as it was then.
            done: hears of its end, where somebody waits for it; perhaps at once.
        """
        with self._lock:
            full = self.counters.waiting >= MOST_WAITING
            if full:
                self.counters.dropped += 1
                log.dropped += 1
            else:
                self.counters.waiting += 1
                log.waiting += 1
        if not full:
            self._background.soon(lambda: self._join(_Append(log, record, covers, done)))
        elif done is not None:
            done(StoreError(f"{MOST_WAITING} records wait already"))

    def fork(self, source: Log, key: str) -> Log:
        """The log of a session that begins as another one; the pictures of that one stay in the
        store until the fork has them."""
        with self._lock:
            source.copying += 1
        return Log(key, source=source)

    def leave(self, log: Log) -> None:
        """A session has left this server, and its log stays."""
        self._let_source_go(log)

    def forget(self, log: Log, at: float, expired: bool = False) -> None:
        """Delete what the store has of a session that has ended; from any thread, at once.

        Args:
            log: the session's.
            at: when its end was asked for, in seconds since 1970. A session that was opened under
                its ID since may have shown pictures already.
            expired: whether nobody asked: where another server has gone on with it, it stays.
        """
        self._let_source_go(log)
        if log.number or log.waiting or log.dropped or log.replaces:
            self._forget_soon(_Forget(log, at, expired))
        self.tidy(log.key)

    def tidy(self, key: str) -> None:
        """Pictures of a session that is not open may have come, or may come soon: delete them later
        where they are nobody's then; from any thread, at once."""
        self._background.soon(lambda: self._tidy_later(key))

    def _tidy_later(self, key: str) -> None:
        until = time.time() + min(PICTURE_SECONDS, TIDY_SECONDS)
        if key in self._to_tidy:
            self._to_tidy[key] = until
        elif len(self._to_tidy) < MOST_TO_TIDY:  # beyond that, they are left to whoever sweeps
            self._to_tidy[key] = until
            asyncio.get_running_loop().call_later(TIDY_SECONDS, self._tidy, key, until)

    def _tidy(self, key: str, until: float) -> None:
        if self._to_tidy.pop(key) > until:  # others came meanwhile
            self._tidy_later(key)
        if not self._is_open(key):
            self._forget_soon(_Forget(Log(key), until, expired=True))

    @property
    def tidying(self) -> int:
        """Sessions whose pictures are looked for soon."""
        return len(self._to_tidy)

    async def settled(self, key: str) -> None:
        """Wait until all that was asked for is done to a session's log: who reads it then finds no
        session that has ended.

        Raises:
            StoreError: the store is too slow, or down.
        """
        task = self._tasks.get(key)
        if task is not None and not (await asyncio.wait({task}, timeout=SYNC_SECONDS))[0]:
            raise StoreError("what was said last has not been written yet")

    def flush(self) -> Future[None]:
        """Done when what was asked for until now is written and deleted; pictures of no session may
        still be there."""

        async def wait() -> None:
            await self._idle.wait()

        return self._background.run(wait())

    def close(self) -> None:
        """Write what is not written yet, as far as that is soon."""
        try:
            self.flush().result(FLUSH_SECONDS)
        except NotInTime:
            with self._lock:
                left = self.counters.waiting
            log.error("the journal's store is down or slow: %d records are not written", left)

    def _forget_soon(self, work: _Forget) -> None:
        with self._lock:
            full = self._forgets >= MOST_WAITING
            self._forgets += not full
        if full:
            log.warning("an ended session stays in the journal: %d wait already", MOST_WAITING)
        else:
            self._background.soon(lambda: self._join(work))

    def _join(self, work: _Append | _Forget) -> None:
        key = work.log.key
        self._idle.clear()
        queue = self._queues.get(key)
        if queue is not None:
            queue.append(work)
            return
        self._queues[key] = deque([work])
        self._tasks[key] = asyncio.ensure_future(self._work(key))

    def _let_source_go(self, log: Log) -> None:
        with self._lock:
            source, log.source = log.source, None
            if source is not None:
                source.copying -= 1

    async def _work(self, key: str) -> None:
        queue = self._queues[key]
        try:
            while queue:
                work = queue.popleft()
                if isinstance(work, _Append):
                    await self._append(work)
                else:
                    try:
                        await self._until_done(partial(self._forget, work))
                    finally:
                        with self._lock:
                            self._forgets -= 1
        except asyncio.CancelledError:
            raise
        except Exception:  # a fault of ours; the sessions' answers go on
            log.exception("the journal of a session stumbled")
        finally:
            del self._queues[key], self._tasks[key]
            if not self._queues:
                self._idle.set()

    # Records.

    async def _append(self, work: _Append) -> None:
        problem: Exception | None = None
        try:
            deadline = None if work.done is None else work.tried_since + SYNC_SECONDS
            until = time.monotonic() + PICTURE_SECONDS
            until = until if deadline is None else min(until, deadline)
            if work.log.elsewhere:
                raise ElsewhereError
            if work.log.behind and work.covers is None:
                raise StoreError("a record before it was not written")
            await self._until_done(lambda: self._pictures(work.log, work.record, until), deadline)
            await self._until_done(lambda: self._put(work.log, work.record), deadline)
        except asyncio.CancelledError as error:
            problem = StoreError("the server is shutting down")
            raise error
        except Exception as error:
            problem = error
        finally:
            self._end(work, problem)

    def _end(self, work: _Append, problem: Exception | None) -> None:
        newly = isinstance(problem, ElsewhereError) and not work.log.elsewhere
        with self._lock:
            self.counters.waiting -= 1
            work.log.waiting -= 1
            self.counters.written += problem is None
            self.counters.elsewhere += newly
            work.log.elsewhere |= newly
            if problem is not None and not isinstance(problem, ElsewhereError):
                self.counters.dropped += 1
                work.log.dropped += 1
            if problem is None and work.covers is not None:
                work.log.covered = max(work.log.covered, work.covers)
        if problem is None:
            self._let_source_go(work.log)  # all pictures are here
        if problem is not None and not isinstance(problem, ElsewhereError):
            log.warning("a record of the journal was not written: %s", problem)
        if work.done is not None:
            work.done(problem)

    async def _put(self, own: Log, record: Record) -> None:
        """Write a record under the next free number.

        Raises:
            ElsewhereError: another server has gone on with the session.
        """
        while True:
            number = own.number + 1
            data = encode(record, number, own.previous)
            if await self._store.create(record_path(own.key, number), data):
                break
            there = await self._store.read(record_path(own.key, number))
            if there is None:  # deleted meanwhile
                continue
            try:
                other, _ = decode(there, own.key, number)
            except DamagedError:
                other = None
            if other is not None and other.writer == own.writer:
                # An earlier try, whose answer was lost on the way.
                own.number, own.previous = number, checksum(there)
                if there == data:
                    return
                continue
            if number > 1 and other is not None and other.generation == own.generation:
                raise ElsewhereError
            if number == 1:
                # Another session of this ID, which the opening of this one has ended.
                named = {picture_path(own.key, name) for name in record.images}
                entries = await self._store.entries(own.key)
                await self._delete(entries, own.asked_at, but=named)
                continue
            if not await self._is_ours(own):
                raise ElsewhereError
            # A leftover: written late by a server whose session was opened anew meanwhile.
            await self._store.replace(record_path(own.key, number), data)
            break
        own.number, own.previous = number, checksum(data)

    async def _is_ours(self, own: Log) -> bool:
        """Whether the log is still the one that was opened with our session."""
        first = await self._read(own.key, 1)
        return first is not None and first.generation == own.generation

    async def _pictures(self, own: Log, record: Record, until: float) -> None:
        """Wait until a record's pictures are in the store, up to a time of `time.monotonic`.

        Raises:
            DamagedError: they do not come.
        """
        pause = FIRST_PAUSE / 4
        for name in record.images:
            if name in own.pictures:
                continue
            path = picture_path(own.key, name)
            while not await self._store.exists(path):
                source = own.source
                if source is not None and await self._store.copy(
                    picture_path(source.key, name), path
                ):
                    break
                if time.monotonic() >= until or name in own.missing:
                    own.missing.add(name)
                    raise DamagedError("a picture was not written to the store in time")
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)
            own.pictures.add(name)

    # The end of a session.

    async def _forget(self, work: _Forget) -> None:
        while work.log.copying:
            await asyncio.sleep(FIRST_PAUSE)
        own = work.log
        entries = await self._store.entries(own.key)  # first: what comes later is not ours
        first = await self._read(own.key, 1)
        if first is not None and first.generation not in {own.generation, *own.replaces}:
            return  # opened anew, here or elsewhere
        known = own.number or own.waiting or own.dropped or own.replaces
        if not known and record_path(own.key, 1) in (each.path for each in entries):
            return  # perhaps another release's
        if work.expired:
            there = await self._read(own.key, own.number + 1)
            if there and there.generation == own.generation and there.writer != own.writer:
                return
        shown = {picture_path(own.key, name) for name in own.pictures}
        await self._delete(entries, work.at, surely=shown)

    async def _read(self, key: str, number: int) -> Record | None:
        """A record; None where there is none, or what nobody can read."""
        data = await self._store.read(record_path(key, number))
        try:
            return None if data is None else decode(data, key, number)[0]
        except DamagedError:
            return None

    async def _delete(
        self,
        entries: Sequence[Entry],
        at: float,
        surely: Collection[str] = (),
        but: Collection[str] = (),
    ) -> None:
        """Delete a session's records and pictures; its first record goes first, so that what is
        left of a deletion that was broken off is no session.

        Args:
            entries: what the store has of it.
            at: pictures that were written later stay.
            surely: paths of pictures that are known to be its own.
            but: of those that stay.
        """
        records = [each.path for each in entries if record_number(each.path) is not None]
        pictures = [
            each.path
            for each in entries
            if record_number(each.path) is None
            and each.path not in but
            and each.written_at <= at - (0.0 if each.path in surely else UNCERTAIN_SECONDS)
        ]
        await self._store.delete(records + pictures)

    # Trying again.

    async def _until_done(
        self, call: Callable[[], Awaitable[Any]], deadline: float | None = None
    ) -> None:
        """Call until the store has done it; after the deadline no more.

        Raises:
            StoreError: of the last try.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                await call()
                return
            except StoreError:
                if deadline is not None and time.monotonic() + pause >= deadline:
                    raise
                with self._lock:
                    self.counters.retries += 1
            await asyncio.sleep(pause * (0.5 + random.random() / 2))
            pause = min(2 * pause, LONGEST_PAUSE)
