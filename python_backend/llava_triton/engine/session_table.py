"""The open sessions: who may open one, how long it lives, and what is freed when it ends."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator

from llava_triton.contract.errors import SessionError, invalid, not_found, unavailable
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.contract.settings import Settings
from llava_triton.engine.image_store import ImageStore
from llava_triton.engine.session import Session, SessionId
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.statistics import Statistics


def unknown(session_id: SessionId) -> SessionError:
    """NOT_FOUND: a tenant has no open session of this ID."""
    return not_found(
        f"session {session_id!r} is unknown or has expired; open a new one by a "
        "request with the sequence start flag"
    )


def taken_by_another(session_id: SessionId) -> SessionError:
    """INVALID_ARG: another tenant has an open session of this ID."""
    return invalid(f"the session ID {session_id!r} is taken; choose a random one")


class SessionTable:
    """Every open session by its ID, longest unused first.

    Args:
        memory: of their keys and values.
        images: of their pictures.
        settings: limits.
        clock: seconds.
        statistics: to count in.
        expired: is called with the ID of every session that is closed because its time is over.
        dropped: is called with every session that is closed, when that was asked for (None: it may
            be resumed), and whether its time is over.
    """

    def __init__(
        self,
        memory: SessionMemory,
        images: ImageStore,
        settings: Settings,
        clock: Callable[[], float],
        statistics: Statistics,
        expired: Callable[[SessionId], None],
        dropped: Callable[[Session, float | None, bool], None] = lambda *_: None,
    ) -> None:
        self._memory = memory
        self._images = images
        self._settings = settings
        self._clock = clock
        self._statistics = statistics
        self._expired = expired
        self._dropped = dropped
        self._sessions: OrderedDict[SessionId, Session] = OrderedDict()
        """Longest unused first."""
        self._by_age: dict[SessionId, Session] = {}
        """The same, longest open first."""

    def __len__(self) -> int:
        return len(self._sessions)

    def oldest_first(self) -> Iterator[Session]:
        """All of them, longest unused first."""
        return iter(self._sessions.values())

    def longest_open_first(self) -> Iterator[Session]:
        """All of them."""
        return iter(self._by_age.values())

    def room_for(self, session_id: SessionId) -> SessionError | None:
        """Why a session of this ID could not be opened now: UNAVAILABLE, there are as many as there
        may be, and none by this ID whose place it could take. For any thread."""
        limit = self._settings.max_sessions
        if session_id in self._sessions or len(self._sessions) < limit:
            return None
        return unavailable(f"all {limit} sessions are in use; try again later")

    def make(self, session_id: SessionId, tenant: str) -> Session:
        """A new session that is not in the table yet.

        Raises:
            SessionError: UNAVAILABLE, as `room_for`; INVALID_ARG, another tenant has an open one of
                this ID.
        """
        session = self.find(session_id)
        if session is not None and session.tenant != tenant:
            raise taken_by_another(session_id)
        full = self.room_for(session_id)
        if full is not None:
            raise full
        now = self._clock()
        return Session(session_id, opened_at=now, last_used_at=now, tenant=tenant)

    def find(self, session_id: SessionId) -> Session | None:
        """The open session of this ID; one that has outlived its limits is closed instead. Not to
        be asked while a turn of it runs, which would go on without what was freed."""
        session = self._sessions.get(session_id)
        if session is not None and self._has_expired(session):
            self._expire(session)
            return None
        return session

    def look(self, session_id: SessionId, tenant: str) -> Session | None:
        """A tenant's open session of this ID; it may have a turn in flight, so it is not closed
        where it has outlived its limits."""
        session = self._sessions.get(session_id)
        return session if session is not None and session.tenant == tenant else None

    def get(self, session_id: SessionId, tenant: str = NO_TENANT) -> Session:
        """A tenant's open session of this ID.

        Raises:
            SessionError: NOT_FOUND, also where another tenant has opened it.
        """
        session = self.find(session_id)
        if session is None or session.tenant != tenant:
            raise unknown(session_id)
        return session

    def open(self, session: Session) -> None:
        """Put a new session into the table; an open one of the same ID is closed."""
        before = self._sessions.get(session.id)
        replaced = before.log if before is not None else None
        if replaced is not None and session.log is not None and not replaced.elsewhere:
            # What the journal has of it goes when the new one is there, or has ended.
            session.log.replaces = replaced.replaces | {replaced.generation}
        self.drop(session.id, forgotten=False)
        self._sessions[session.id] = self._by_age[session.id] = session
        self._statistics.sessions_opened += 1

    def used(self, session_id: SessionId, tenant: str) -> None:
        """The idle time of a tenant's session begins anew, if it is open."""
        session = self._sessions.get(session_id)
        if session is not None and session.tenant == tenant:
            session.last_used_at = self._clock()
            self._sessions.move_to_end(session_id)
            self._memory.used(session)

    def drop(
        self,
        session_id: SessionId,
        asked_at: float | None = None,
        *,
        forgotten: bool = True,
        expired: bool = False,
    ) -> None:
        """Close a session and free all it holds, whoever still refers to it.

        Args:
            session_id: unknown ones are fine.
            asked_at: when that was asked for, by `time.monotonic`; None: now.
            forgotten: whether the journal forgets it, too; else it may be resumed.
            expired: whether its time is over, and nobody ended it.
        """
        session = self._sessions.pop(session_id, None)
        if session is not None:
            del self._by_age[session_id]
            self._memory.truncate(session, 0)
            self.forget_taken_back(session)
            self.forget_images(session, 0)
            self._dropped(session, (asked_at or time.monotonic()) if forgotten else None, expired)
            self._statistics.sessions_closed += 1

    def forget_images(self, session: Session, first: int) -> None:
        """Let go of a session's pictures from number `first` on."""
        for image in session.images[first:]:
            self._images.release(image)
        del session.images[first:]

    def forget_taken_back(self, session: Session) -> None:
        """What a turn has taken back will not come back."""
        back, session.taken_back = session.taken_back, None
        for image in back.images if back else ():
            self._images.release(image)

    def clear(self) -> None:
        """Close all; those that are in the journal may be resumed."""
        for session_id in list(self._sessions):
            self.drop(session_id, forgotten=False)

    def expire(self, active: Container[SessionId]) -> None:
        """Close what has outlived its limits, except active sessions. Costs something for those and
        the active ones alone, however many others are open."""
        now = self._clock()
        for in_order, is_over in (
            (self.oldest_first, self._is_idle_too_long),
            (self.longest_open_first, self._is_open_too_long),
        ):
            over = []
            for session in in_order():
                if session.id in active:
                    continue
                if not is_over(session, now):
                    break
                over.append(session)
            for session in over:
                self._expire(session)

    def _has_expired(self, session: Session) -> bool:
        now = self._clock()
        return self._is_idle_too_long(session, now) or self._is_open_too_long(session, now)

    def _is_idle_too_long(self, session: Session, now: float) -> bool:
        return session.last_used_at + self._settings.session_idle_seconds <= now

    def _is_open_too_long(self, session: Session, now: float) -> bool:
        return session.opened_at + self._settings.session_lifetime_seconds <= now

    def _expire(self, session: Session) -> None:
        self.drop(session.id, expired=True)
        self._statistics.sessions_expired += 1
        self._expired(session.id)
