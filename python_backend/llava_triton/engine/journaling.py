"""Sessions and the journal: what of a session is written down, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from llava_triton.contract.errors import invalid, not_found, unavailable
from llava_triton.conversation.prompt import CompletedTurn
from llava_triton.device import work_beside
from llava_triton.engine.image_store import Image, digest_of
from llava_triton.engine.resumed import Resumed
from llava_triton.engine.session import PictureSpan, Session, SessionId
from llava_triton.engine.session_table import unknown
from llava_triton.engine.turn import QueuedTurn, RunningTurn, TurnRequest
from llava_triton.journal.journal import Journal
from llava_triton.journal.reading import Journaled
from llava_triton.journal.records import DamagedError
from llava_triton.journal.store import StoreError
from llava_triton.journal.writer import Done
from llava_triton.model.runner import ModelRunner

EncodePictures = Callable[[Sequence[bytes], str], Sequence[Tensor]]
"""From pictures as sent and their tenant to the features [T, D] of each. Blocks; may be called from
several threads. Raises SessionError."""
AT_ONCE = 4
"""Sessions that are read at the same time."""


class SessionJournal:
    """Writes down what sessions say, and brings them back.

    Args:
        journal: where to, and where from.
        encode: makes features of pictures.
        runner: the language model.
    """

    def __init__(self, journal: Journal, encode: EncodePictures, runner: ModelRunner) -> None:
        self._journal = journal
        self._encode = encode
        self._runner = runner
        self.sync = journal.sync
        """Whether an answer ends only when its turn is safe."""
        self.counters = journal.counters
        self._threads = ThreadPoolExecutor(AT_ONCE, "resuming", initializer=runner.leave_threads)

    # For the engine's thread; nothing waits.

    def begin(self, session: Session, turn: QueuedTurn, source: Session | None) -> None:
        """A session opens with a turn, perhaps as a copy of another one."""
        log = source.log if source is not None else None
        session.log = self._journal.begin(session.id, session.tenant, turn.arrived_at, log)

    def write_turn(
        self,
        running: RunningTurn,
        completed: CompletedTurn | None = None,
        done: Done | None = None,
    ) -> None:
        """Write what a turn has done to its session.

        Args:
            running: the turn.
            completed: its end, where its session does not have it yet.
            done: hears, on another thread, when it is safe, or why it is not.
        """
        session, request = running.session, running.turn.request
        last = () if completed is None else (completed,)
        pending = running.pending_images if running.max_tokens == 0 else 0
        kept = 0 if request.start else running.kept_mark.turns
        self._write(session, kept, last, pending, request.text, running.finish_reason, done)

    def write_session(self, session: Session) -> None:
        """Write a session as it is, in the place of all that was written of it."""
        self._write(session, 0, (), session.pending_images)

    def write_use(self, session: Session) -> None:
        """Write that a session was used and is as it was, unless its last record is young."""
        if session.log is not None and self._journal.is_stale(session.log):
            self._write(session, len(session.turns), (), session.pending_images)

    def forget(self, session: Session, asked_at: float, expired: bool = False) -> None:
        """A session has ended, or has expired here; that was asked for at a time of
        `time.monotonic`."""
        if session.log is not None and not session.log.elsewhere:
            self._journal.forget(session.log, asked_at, expired)
        else:
            self.leave(session)

    def tidy(self, session_id: SessionId, tenant: str) -> None:
        """A turn was refused, whose pictures may lie in the store."""
        self._journal.tidy(session_id, tenant)

    def leave(self, session: Session) -> None:
        """A session leaves this server, and its log stays."""
        if session.log is not None:
            self._journal.leave(session.log)

    def resume(self, request: TurnRequest) -> Future[Resumed]:
        """Begin to read the session of a turn, which is not open.

        Its end may be SessionError: NOT_FOUND, there is none, or it is damaged; INVALID_ARG, it is
        another model's; UNAVAILABLE, the store does not answer.
        """
        return self._threads.submit(self._read, request)

    def restore(self, session: Session, resumed: Resumed, images: list[Image]) -> None:
        """Make a new session what it was.

        Args:
            session: has nothing yet.
            resumed: what was read.
            images: its pictures, held for it.
        """
        said = resumed.found.conversation
        session.tokens = said.tokens
        session.turns = said.turns
        session.images = images
        session.pending_images, session.forgotten = said.pending, said.forgotten
        session.truncation = said.truncation
        session.spans = [
            PictureSpan(span.start, span.length, image)
            for span, image in zip(said.spans, images, strict=False)
        ]
        session.log = self._journal.go_on(resumed.found)
        self.counters.resumed += 1

    def age(self, resumed: Resumed) -> float:
        """Seconds for which a session has been open."""
        return max(0.0, self._journal.wall() - resumed.found.last.opened_at)

    def end_unopened(self, resumed: Resumed, turn: QueuedTurn) -> None:
        """A session ends with a turn, and is only in the journal."""
        self._journal.forget(self._journal.go_on(resumed.found), turn.arrived_at)

    def shutdown(self) -> None:
        """Write what is not written yet, as far as that is soon, and end."""
        self._threads.shutdown(cancel_futures=True)
        self._journal.close()

    def _write(
        self,
        session: Session,
        kept: int,
        completed: Sequence[CompletedTurn],
        pending: int,
        text: str | None = None,
        finish_reason: str = "",
        done: Done | None = None,
    ) -> None:
        log = session.log
        assert log is not None
        if log.behind or not (log.number or log.waiting):
            kept = 0
        last = session.turns[kept - 1] if kept else None
        end, images = (last.end, last.images) if last else (0, 0)
        self._journal.append(
            log,
            session.tenant,
            kept=kept,
            whole=kept == 0,
            tokens=session.tokens[end:],
            spans=list(session.pictures(end, len(session.tokens))),
            turns=[*session.turns[kept:], *completed],
            images=[image.digest.hex() for image in session.images[images:]],
            pending=pending,
            forgotten=session.forgotten,
            truncation=session.truncation,
            text=text,
            finish_reason=finish_reason,
            done=done,
        )

    # On threads of its own.

    def _read(self, request: TurnRequest) -> Resumed:
        session_id = request.session_id
        try:
            found = self._journal.read(session_id, request.tenant)
            if found is None:
                raise unknown(session_id)
            if found.last.tenant != request.tenant:
                raise DamagedError("it is another tenant's")
            if request.end and request.is_empty:  # it shows nothing any more
                return Resumed(found, (), ())
            return self._with_pictures(request, found)
        except DamagedError as error:
            raise not_found(
                f"session {session_id!r} cannot be resumed, because its journal is damaged: "
                f"{error}; open a new one"
            ) from error
        except StoreError as error:
            raise unavailable(
                f"session {session_id!r} cannot be resumed now, because the journal's store does "
                f"not answer ({error}); try again later"
            ) from error

    def _with_pictures(self, request: TurnRequest, found: Journaled) -> Resumed:
        if found.last.checkpoint != self._journal.checkpoint:
            raise invalid(
                f"session {request.session_id!r} cannot be resumed: another model has answered in "
                "it, and this one does not know its tokens; open a new one"
            )
        said, key = found.conversation, found.last.session
        if any(token >= self._runner.vocabulary for token in said.tokens):
            raise DamagedError("it has tokens that the model does not know")
        names = list(dict.fromkeys(said.images))
        items = self._journal.pictures(key, names)
        encoded = self._encode([items[name] for name in names], request.tenant) if names else ()
        features = dict(zip(names, encoded, strict=True))
        with work_beside(self._runner.device):  # it waits for what is copied to the host
            digests = {name: digest_of(each, request.tenant) for name, each in features.items()}
        for span, name in zip(said.spans, said.images, strict=False):
            if len(features[name]) != span.length:
                raise DamagedError("a picture has another number of tokens than it had")
        for name, digest in digests.items():
            if digest.hex() != name:  # by rounding; later records know it by its new name
                self._journal.keep(key, digest.hex(), items[name])
        return Resumed(
            found,
            [features[name] for name in said.images],
            [digests[name] for name in said.images],
        )
