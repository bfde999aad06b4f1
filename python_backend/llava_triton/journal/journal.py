"""The journal of one server: what the engine writes and reads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

from llava_triton.contract.sampling_parameters import Truncation
from llava_triton.contract.settings import Settings
from llava_triton.conversation.prompt import CompletedTurn, Span
from llava_triton.journal.background import Background
from llava_triton.journal.pictures import PictureWriter
from llava_triton.journal.reading import Journaled, read_pictures, read_session, sweep
from llava_triton.journal.records import Record, session_key
from llava_triton.journal.store import Store, StoreError
from llava_triton.journal.writer import FLUSH_SECONDS, Done, Log, Writer

log = logging.getLogger(__name__)

STALE_SHARE = 0.05
"""Of the idle time: so much sooner a session may expire here than on its server."""
SWEEP_SECONDS = 600.0
"""How often a folder is looked through for sessions of servers that have died."""


class Journal:
    """Sessions as records in a store.

    Args:
        settings: where it lies, and how long sessions live.
        checkpoint: the identity of the model.
        wall: seconds since 1970.

    Raises:
        StoreError: the store cannot be used at all.
    """

    def __init__(
        self, settings: Settings, checkpoint: str, wall: Callable[[], float] = time.time
    ) -> None:
        self.checkpoint = checkpoint
        self.sync = settings.journal_sync
        self.wall = wall
        self._idle_seconds = settings.session_idle_seconds
        self._lifetime_seconds = settings.session_lifetime_seconds
        self._store = Store(settings.journal)
        self._background = Background("journal")
        self._open: dict[str, Log] = {}
        """The sessions that are open here, by key."""
        self._writer = Writer(self._store, self._background, self._open.__contains__)
        self._pictures = PictureWriter(self._store, self._background)
        self.counters = self._writer.counters
        self._background.run(self._sweep() if self._store.is_folder else self._look())

    # What the engine's thread asks for; nothing waits.

    def begin(
        self, session_id: int | str, tenant: str, asked_at: float, source: Log | None = None
    ) -> Log:
        """The log of a session that opens.

        Args:
            session_id: its ID.
            tenant: whose it is.
            asked_at: when its opening was asked for, by `time.monotonic`.
            source: the log of the session that it is a copy of.
        """
        key = session_key(session_id, tenant)
        begun = Log(key) if source is None else self._writer.fork(source, key)
        begun.opened_at, begun.asked_at = self.wall(), _in_the_world(asked_at)
        self._open[key] = begun
        return begun

    def go_on(self, found: Journaled) -> Log:
        """The log of a session that was read from the journal."""
        last = found.last
        own = self._open[last.session] = Log(
            last.session,
            generation=last.generation,
            opened_at=last.opened_at,
            number=found.number,
            previous=found.previous,
            pictures=set(found.conversation.images),
            told_at=last.written_at,
        )
        return own

    def is_stale(self, own: Log) -> bool:
        """Whether a session's last record is so old that its use has to be written."""
        if own.elsewhere or own.told_at is None:
            return False
        return self.wall() - own.told_at >= STALE_SHARE * self._idle_seconds

    def append(
        self,
        own: Log,
        tenant: str,
        *,
        kept: int,
        whole: bool,
        tokens: Sequence[int],
        spans: Sequence[Span],
        turns: Sequence[CompletedTurn],
        images: Sequence[str],
        pending: int,
        text: str | None,
        finish_reason: str,
        forgotten: int = 0,
        truncation: Truncation = "disabled",
        done: Done | None = None,
    ) -> None:
        """Write a step of a session; see `Record`.

        Args:
            own: the session's log.
            whole: whether it says all of the session.
            done: hears of its end.
        """
        own.told_at = now = self.wall()
        record = Record(
            session=own.key,
            tenant=tenant,
            generation=own.generation,
            writer=own.writer,
            checkpoint=self.checkpoint,
            opened_at=own.opened_at,
            written_at=now,
            expires_at=min(now + self._idle_seconds, own.opened_at + self._lifetime_seconds),
            kept=kept,
            tokens=tokens,
            spans=spans,
            turns=turns,
            images=images,
            pending=pending,
            text=text,
            finish_reason=finish_reason,
            forgotten=forgotten,
            truncation=truncation,
        )
        self._writer.append(own, record, own.dropped if whole else None, done)

    def forget(self, own: Log, asked_at: float, expired: bool = False) -> None:
        """A session has ended: delete what the store has of it.

        Args:
            own: its log.
            asked_at: when its end was asked for, by `time.monotonic`.
            expired: whether nobody asked: where another server has gone on with it, it stays.
        """
        self._closed(own)
        self._writer.forget(own, _in_the_world(asked_at), expired)

    def tidy(self, session_id: int | str, tenant: str) -> None:
        """A turn with pictures was refused: they are deleted later, where its session is none."""
        self._writer.tidy(session_key(session_id, tenant))

    def leave(self, own: Log) -> None:
        """A session has left this server, and may be resumed."""
        self._closed(own)
        self._writer.leave(own)

    def _closed(self, own: Log) -> None:
        if self._open.get(own.key) is own:  # else another one has taken its place
            del self._open[own.key]

    # What threads ask for that may wait.

    def read(self, session_id: int | str, tenant: str) -> Journaled | None:
        """A session; None where there is none that may be resumed.

        Raises:
            DamagedError: its log is not what was written.
            StoreError: the store does not answer.
        """
        key = session_key(session_id, tenant)

        async def read() -> Journaled | None:
            await self._writer.settled(key)
            return await read_session(self._store, key, self.wall())

        return self._background.run(read()).result()

    def pictures(self, key: str, names: Collection[str]) -> dict[str, bytes]:
        """Pictures of a session as they were sent, by name; errors as of `read`."""
        return self._background.run(read_pictures(self._store, key, names)).result()

    def keep(self, key: str, name: str, item: bytes) -> None:
        """Write a picture under another name, behind everything else."""
        self._pictures.keep(key, name, item)

    def flush(self) -> Future[None]:
        """As `Writer.flush`."""
        return self._writer.flush()

    def close(self) -> None:
        """Write what is not written yet, as far as that is soon, and end."""
        self._pictures.close(FLUSH_SECONDS)
        self._writer.close()
        self._background.close()

    async def _look(self) -> None:
        """Say at once, and not with the first turn, where the bucket cannot be used."""
        try:
            await self._store.folders()
        except StoreError as error:
            log.error("the journal %s does not answer: %s", self._store.url, error)

    async def _sweep(self) -> None:
        while True:
            try:
                # By the file system's clock: a server whose own clock jumps deletes nothing.
                older = time.time() - 2 * self._idle_seconds
                swept = await sweep(self._store, older, frozenset(self._open))
                if swept:
                    log.info("%d sessions of other servers have expired in the journal", swept)
            except StoreError as error:
                log.warning("the journal could not be swept: %s", error)
            await asyncio.sleep(SWEEP_SECONDS)


def _in_the_world(at: float) -> float:
    """A time of `time.monotonic` in seconds since 1970, as a store dates objects."""
    return time.time() - (time.monotonic() - at)
