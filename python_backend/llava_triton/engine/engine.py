"""The engine: one thread that keeps the state of every session, and a device that advances them."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from llava_triton.contract.delta import Delta, FinishReason
from llava_triton.contract.errors import (
    ErrorCode,
    SessionError,
    as_session_error,
    gone_elsewhere,
    invalid,
    unavailable,
)
from llava_triton.contract.operations import NO_OPERATION
from llava_triton.contract.settings import Settings
from llava_triton.conversation.prompt import Prompt
from llava_triton.conversation.renderer import ConversationRenderer
from llava_triton.device import is_lost, leave_cores
from llava_triton.engine.block_pool import BlockPool
from llava_triton.engine.image_store import ImageStore
from llava_triton.engine.lanes import Lanes
from llava_triton.engine.preparation import TurnPreparation
from llava_triton.engine.scheduler import Scheduler, Work
from llava_triton.engine.session import Mark, Session, SessionId, common_prefix
from llava_triton.engine.session_memory import SessionMemory
from llava_triton.engine.session_table import SessionTable, taken_by_another, unknown
from llava_triton.engine.state import EngineState
from llava_triton.engine.statistics import Statistics
from llava_triton.engine.step_parts import step_part
from llava_triton.engine.turn import (
    Listener,
    Phase,
    Prepared,
    QueuedTurn,
    RunningTurn,
    TurnRequest,
    closing_turn,
)
from llava_triton.model.device_threads import DeviceThreads
from llava_triton.model.logprobs import TokenLogprobs
from llava_triton.model.runner import ModelRunner
from llava_triton.model.sampling import NO_TOKEN
from llava_triton.model.step import Choice, Step, StepPart, StepResult, TransferError

if TYPE_CHECKING:
    from llava_triton.engine.journaling import SessionJournal

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SWEEP_SECONDS = 1.0
"""How often the engine looks for expired sessions."""
HEARTBEAT_SECONDS = 0.25
"""A turn without a token yet gets an empty piece this often: sending one is how a caller notices
that its client has gone."""
NOT_FINITE = (
    "the model computed values that are not finite; the session is at its last completed turn: ask "
    "again, or open a new session"
)


class Engine:
    """Answers turns of many sessions at once.

    All public methods may be called from any thread and return at once. The engine's own thread
    keeps the state; the device computes in another one, so that the next turns begin and the last
    tokens become text while it works. Each session's turns run one after another in the order they
    came; the running turns of all sessions advance together.

    Args:
        runner: the language model; it is the engine's alone from now on.
        tokenizer: the checkpoint's tokenizer.
        settings: limits.
        clock: seconds, for idle limits and lifetimes.
        expired: is called on the engine's thread with the ID of every session that the engine has
            closed because its time is over; whoever closes one otherwise knows it. Must not wait.
        journal: what sessions say is written there, and they are resumed from there; None: nowhere.
            It is the engine's alone from now on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: object,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        expired: Callable[[SessionId], None] = lambda _: None,
        journal: SessionJournal | None = None,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._renderer = ConversationRenderer(tokenizer, runner.image_token_id)
        self._preparation = TurnPreparation(runner, tokenizer, self._renderer, settings)
        self._statistics = Statistics()
        self._memory = SessionMemory(
            BlockPool(runner.pages.blocks, cache_freed=settings.cache_freed_blocks),
            runner.pages,
            runner.host_kv_bytes,
        )
        self._images = ImageStore(
            runner.features_on_device, runner.image_bytes_on_device, runner.host_image_bytes
        )
        self._journal = journal
        self._expired = expired
        self._sessions = SessionTable(
            *(self._memory, self._images, settings, clock, self._statistics, expired),
            dropped=self._dropped,
        )
        self._lanes = Lanes()
        self._running: dict[str, RunningTurn] = {}
        """By the turn's ID, in the order they began."""
        self._scheduler = Scheduler(
            self._memory,
            self._idle_sessions,
            runner.prefill_chunk_tokens,
            settings,
            # A device that is given one step at a time computes on the cores that plan the next.
            questions_alone=runner.steps_at_once == 1,
        )
        self._in_flight: deque[list[Work]] = deque()
        """The works of the steps that the device has, oldest first."""
        self._lost = 0
        """Of those, how many are of no use: they built on a step that failed."""
        self._with_new_tokens: list[RunningTurn] = []
        """Turns of the last step whose listeners have not heard of it yet."""
        self._to_try_alone: deque[RunningTurn] = deque()
        """Turns of a step that failed: any of them may be the cause."""
        self._next_sweep_at = 0.0
        self._stopping = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        runner.leave_threads()
        self._device = DeviceThreads(runner)
        self._beside = ThreadPoolExecutor(1, "preparing", initializer=runner.leave_threads)
        """Prepares the turns that take long, so that only others of their kind wait for them. One
        thread: they begin in the order they came."""
        self._compiling = ThreadPoolExecutor(1, "compiling", initializer=runner.leave_threads)
        """Prepares those whose answers must have a form: pictures do not wait for grammars."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What callers do.

    def submit(self, request: TurnRequest, listener: Listener) -> str:
        """Take a turn; `listener` gets the pieces of its answer, or one error.

        Returns:
            The turn's ID, known to its caller alone.
        """
        turn = QueuedTurn(request, listener)
        self._command(lambda: self._enqueue(turn))
        return turn.id

    def cancel(self, turn_id: str) -> None:
        """Stop a turn; its session goes back to its last completed turn. Unknown IDs are fine."""
        self._command(lambda: self._cancel(turn_id))

    def stop_answer(self, session_id: SessionId, tenant: str, listener: Listener) -> None:
        """End the answer that a session is giving, as a completed turn with what was said so far.

        Turns that wait behind it are answered next. Where no answer is in flight, nothing happens:
        it may have ended just before.

        Args:
            session_id: whose answer.
            tenant: whose session.
            listener: gets one final piece without text, with the numbers of the answer that was
                stopped and 0 where there was none; or NOT_FOUND, where the tenant has no such
                session.
        """
        self._command(lambda: self._stop_answer(session_id, tenant, listener))

    def cancel_answer(
        self, session_id: SessionId, tenant: str, request_id: str, listener: Listener
    ) -> None:
        """Undo a turn of a session, as `cancel`. Where there is none such, nothing happens.

        Args:
            session_id: whose turn.
            tenant: whose session.
            request_id: of the turn.
            listener: gets one final piece without text.
        """
        self._command(lambda: self._cancel_answer(session_id, tenant, request_id, listener))

    def close(self, session_id: SessionId) -> None:
        """Cancel a session's turns and free everything it holds. Unknown IDs are fine."""
        self._command(lambda: self._close_now(session_id))

    def not_taken(self, session_id: SessionId, tenant: str) -> None:
        """A request was refused before it was a turn; what the journal has of its pictures goes,
        unless a session has them."""
        if self._journal is not None:
            self._journal.tidy(session_id, tenant)

    def knows(self, session_id: SessionId) -> bool:
        """Whether a session is open or has turns on their way; waits as `statistics` does."""
        sessions, lanes = self._sessions, self._lanes
        return self._on_thread(
            lambda: session_id in lanes or sessions.find(session_id) is not None
        ).result()

    def room_for_a_session(self, session_id: SessionId) -> SessionError | None:
        """Why a turn that opens a session under this ID would be refused now, if it would; waits
        for nothing. Room may go before the turn comes, so the turn is asked again."""
        if self._journal is not None and len(self._lanes) < self._settings.max_sessions:
            return None  # an idle session gives way
        return self._sessions.room_for(session_id)

    def statistics(self) -> Statistics:
        """The engine's counts. Waits for the engine's thread, but not for the device."""
        return self._on_thread(self._count).result()

    def inspect(self, look: Callable[[EngineState], Result]) -> Future[Result]:
        """What `look` finds in the engine's state, for tests and measurements.

        It is called on the engine's thread, between two steps: nothing else changes the state
        meanwhile.
        """
        return self._on_thread(
            lambda: look(
                EngineState(
                    sessions=self._sessions,
                    lanes=self._lanes,
                    memory=self._memory,
                    images=self._images,
                    scheduler=self._scheduler,
                    running=list(self._running.values()),
                    idle_sessions=self._idle_sessions,
                    steps_in_flight=len(self._in_flight),
                    steps_lost=self._lost,
                    to_try_alone=len(self._to_try_alone),
                )
            )
        )

    def _on_thread(self, action: Callable[[], Result]) -> Future[Result]:
        result: Future[Result] = Future()

        def command() -> None:
            try:
                result.set_result(action())
            except BaseException as error:
                result.set_exception(error)

        self._command(command)
        return result

    def shutdown(self) -> None:
        """Stop the threads and free all sessions; turns in flight fail with UNAVAILABLE."""
        self._command(self._stop)
        self._thread.join()
        self._device.shutdown()
        for beside in (self._beside, self._compiling):
            beside.shutdown(cancel_futures=True)
        if self._journal is not None:
            self._journal.shutdown()
        self._obey()

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if not self._thread.is_alive():  # nobody else would hear of it
            self._obey()

    # The loop.

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._obey(wait=True)
                self._let_first_tokens_go()
                self._launch()
                self._tell_new_tokens()  # while the device computes the next ones
                self._sweep()
            except Exception:  # the thread must live: every session depends on it
                log.exception("the engine's loop stumbled")
        for turn in self._lanes.all():
            self._tell(turn, unavailable("the server is shutting down"))
        self._lanes = Lanes()
        self._running.clear()
        self._sessions.clear()

    def _obey(self, wait: bool = False) -> None:
        """Do what callers and the device asked for; wait for it where there is nothing else."""
        busy = not self._in_flight and any(
            not turn.finish_reason for turn in self._running.values()
        )
        try:
            command = self._commands.get(
                block=wait and not busy,
                timeout=HEARTBEAT_SECONDS if self._running else SWEEP_SECONDS,
            )
            while True:
                try:
                    command()
                except Exception:
                    log.exception("a command failed")
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _let_first_tokens_go(self) -> None:
        """Where the device computes on the cores that also send, let it wait for first tokens."""
        computes_on_our_cores = self._runner.steps_at_once == 1
        if computes_on_our_cores and any(turn.answer_tokens == 1 for turn in self._with_new_tokens):
            self._tell_new_tokens()
            leave_cores(self._scheduler.clock.decode_seconds)
            self._obey()

    def _stop(self) -> None:
        self._stopping = True

    def _sweep(self) -> None:
        now = time.monotonic()
        for running in list(self._running.values()):
            if running.turn.is_over_time and not running.finish_reason:
                self._end_over_time(running)
            elif not running.answer_tokens and now - running.turn.told_at >= HEARTBEAT_SECONDS:
                self._tell(running.turn, running.delta(""))
        if now >= self._next_sweep_at:
            self._next_sweep_at = now + SWEEP_SECONDS
            self._sessions.expire(self._lanes)
            for turn in self._lanes.all():
                if turn.id not in self._running and turn.is_over_time:
                    self._end_waiting(turn, _too_late(turn))

    # Turns begin ...

    def _enqueue(self, turn: QueuedTurn) -> None:
        error = self._room_for(turn)
        if error is None:
            self._lanes.join(turn)
            self._begin_next(turn.request.session_id)
            return
        self._refuse(turn, error)
        if turn.request.end and not self._stopping and self._ends_something(turn):
            # Triton has ended the sequence: the session ends when the turns before are done.
            self._lanes.join(closing_turn(turn))
            self._begin_next(turn.request.session_id)

    def _room_for(self, turn: QueuedTurn) -> SessionError | None:
        """Why a turn cannot be taken now."""
        request, lanes, settings = turn.request, self._lanes, self._settings
        before = lanes.of_session(request.session_id)
        if self._stopping:
            return unavailable("the server is shutting down")
        if before and not before[0].request.operation.resume:
            owner: str | None = before[0].request.tenant
        else:
            # Only where no turn of it has begun: to look a session up may end it. One that is being
            # read may be anybody's, whoever asked for it first.
            session = self._sessions.find(request.session_id)
            owner = session.tenant if session else None
        if owner not in (None, request.tenant):
            # At once: behind the owner's turns a stranger would learn that there are some.
            return _not_yours(request)
        if request.only_ends and self._ends_something(turn):
            return None  # it makes room
        if lanes.turns >= settings.max_queued_turns:
            return unavailable(
                f"{settings.max_queued_turns} turns are waiting already; try again later"
            )
        if len(before) >= settings.max_queued_turns_per_session:
            return unavailable(
                f"{settings.max_queued_turns_per_session} turns of this session are waiting "
                "already; wait for their answers"
            )
        # Half is left to turns that need not wait, so that those behind others cannot take it all.
        most = settings.max_queued_features_bytes // (2 if before else 1)
        waiting, new = lanes.features_bytes, request.features_bytes
        if new and waiting and waiting + new > most:
            return unavailable("the memory for pictures of waiting turns is full; try again later")
        return None

    def _ends_something(self, turn: QueuedTurn) -> bool:
        """Whether an END ends what an earlier one does not."""
        session_id = turn.request.session_id
        before = self._lanes.of_session(session_id)
        if before:
            return not before[-1].request.end
        return self._sessions.find(session_id) is not None

    def _begin_next(self, session_id: SessionId) -> None:
        """Begin the first turn in a session's lane, unless it runs or is being prepared."""
        turn = self._lanes.head(session_id)
        if turn is None or turn.id in self._running:
            return
        if turn.preparation is not None and not turn.preparation.done():
            return
        request = turn.request
        try:
            if request.operation.resume:
                if not self._bring_back(turn):
                    return
                request = turn.request
            if request.start:
                self._make_room(request)
            session = (
                self._sessions.make(session_id, request.tenant)
                if request.start
                else self._sessions.get(session_id, request.tenant)
            )
            if session.log is not None and session.log.elsewhere:
                self._leave_to_another(session)
                raise gone_elsewhere(session_id)
            source = self._source(request)
            mark = self._preparation.where_to_begin(request, source or session)
            if source is not None:
                session.copy(source, mark)
            # Before a fork that is prepared beside this thread its source may have gone on: what
            # it answers is the last question as it is now.
            again = session.message_at(mark) if request.operation.regenerate else None
            prepared = self._prepared(turn, session, mark, again)
            if prepared is None:
                return
            if again is not None:
                prepared = replace(prepared, message=again)
            running = self._preparation.begin(turn, prepared, session, mark)
            pictures = self._images.hold_all(prepared.digests, request.image_features)
        except Exception as error:
            if request.end:
                # Triton has ended the sequence for good. A stranger's END ends no more than that:
                # the owner may resume the session.
                owns = self._sessions.look(session_id, request.tenant) is not None
                self._sessions.drop(session_id, turn.arrived_at, forgotten=owns)
            else:
                self._used(session_id, request.tenant)
            self._refuse(turn, as_session_error(error))
            self._leave(turn)
            return
        if source is not None:  # before the session is opened, because that may close its source
            self._memory.share(source, session)
            self._images.hold_again(session.images)
        if request.start:
            session.truncation = request.sampling.truncation or session.truncation
            if self._journal is not None:
                self._journal.begin(session, turn, source)
            self._sessions.open(session)
        # From here on the turn changes its session, and `_roll_back` undoes it.
        self._lanes.forget_features(turn)
        self._running[turn.id] = running
        running.kept = running.kept_mark.length
        try:
            if running.forgets:
                self._images.hold_again(session.images[running.kept_mark.images : mark.images])
                session.forget(running.forgets, mark)
                self._memory.truncate(session, running.kept)
            elif request.operation != NO_OPERATION and source is None:
                session.go_back(mark)
            session.images += pictures
            session.append(prepared.past.prompt)
            session.turns += prepared.past.turns
            session.forgotten += prepared.past.forgotten
            same = session.replace_message(prepared.message)
            if not running.forgets:
                running.kept = same
                self._memory.truncate(session, running.remembered)
            running.cached_tokens = session.key_values.computed
            if request.is_asked:
                session.asked = running.prompt_tokens
            if request.is_empty:
                running.finish_reason = "closed" if request.end else "prefilled"
                self._complete(running)
        except Exception as error:  # a fault of ours; left running, it would never be computed
            log.exception("a turn could not begin")
            self._roll_back(running, as_session_error(error))

    def _bring_back(self, turn: QueuedTurn) -> bool:
        """Open the session of a turn that resumes it, and make it a turn of an open session.

        Returns:
            Whether it is one now; else it is going to be, or there is nothing left to do.

        Raises:
            SessionError: it cannot be resumed.
        """
        request, journal = turn.request, self._journal
        if not request.start:
            raise invalid("resume came without the sequence start flag; send it with that")
        if request.operation.fork is not None:
            raise invalid("resume and fork came in one request; send them one by one")
        session = self._sessions.find(request.session_id)
        if session is None:
            if journal is None:
                raise unknown(request.session_id)
            if turn.resuming is None:
                turn.resuming = journal.resume(request)
                turn.resuming.add_done_callback(
                    lambda _: self._commands.put(lambda: self._begin_next(request.session_id))
                )
                return False
            if not turn.resuming.done():
                return False
            resumed = turn.resuming.result()
            if request.end and request.is_empty:
                journal.end_unopened(resumed, turn)
                said = resumed.found.conversation
                self._answer_at_once(turn, "closed", len(said.tokens), said.forgotten)
                return False
            self._make_room(request)
            session = self._sessions.make(request.session_id, request.tenant)
            images = self._images.hold_all(resumed.digests, resumed.features)
            session.opened_at -= journal.age(resumed)
            journal.restore(session, resumed, images)
            turn.resuming = None  # it holds the features
            self._sessions.open(session)
            for other in self._lanes.of_session(session.id):
                if other.request.tenant != session.tenant:
                    self._end_waiting(other, _not_yours(other.request))
        elif session.tenant != request.tenant:
            raise unknown(request.session_id)
        if request.is_empty and not request.end and request.operation.rewind is None:
            self._used(session.id, session.tenant)
            self._answer_at_once(turn, "prefilled", len(session.tokens), session.forgotten)
            return False
        turn.request = request.on_open_session()
        return True

    def _answer_at_once(
        self, turn: QueuedTurn, reason: FinishReason, tokens: int, forgotten: int
    ) -> None:
        """End a turn that had nothing to compute and changes nothing of what was said."""
        self._statistics.turns_completed += turn.asked_for
        self._tell(turn, Delta("", reason, tokens, 0, 0, 0.0, num_forgotten_turns=forgotten))
        self._leave(turn)

    def _used(self, session_id: SessionId, tenant: str) -> None:
        """A tenant's session was used by a turn that changed nothing, if it is open."""
        self._sessions.used(session_id, tenant)
        session = self._sessions.look(session_id, tenant)
        if self._journal is not None and session is not None:
            self._journal.write_use(session)

    def _dropped(self, session: Session, asked_at: float | None, expired: bool) -> None:
        if self._journal is not None and asked_at is not None:
            self._journal.forget(session, asked_at, expired)
        elif self._journal is not None:
            self._journal.leave(session)

    def _make_room(self, request: TurnRequest) -> None:
        """Where as many sessions are open as may be, let the longest idle one go that the journal
        has: its next turn resumes it."""
        if self._journal is None or self._sessions.room_for(request.session_id) is None:
            return
        for session in self._sessions.oldest_first():
            needed = session.id in self._lanes or session.id == request.operation.fork
            if not needed and session.log is not None and session.log.is_safe:
                self._journal.counters.hibernated += 1
                self._leave_to_another(session)
                return

    def _leave_to_another(self, session: Session) -> None:
        """Close a session that is, or may be, resumed: elsewhere, or here later."""
        self._sessions.drop(session.id, forgotten=False)
        self._expired(session.id)

    def _source(self, request: TurnRequest) -> Session | None:
        """The session that a turn copies; None where it copies none.

        Raises:
            SessionError: NOT_FOUND, its tenant has no open session of that ID.
        """
        source_id = request.operation.fork
        if source_id is None or not request.start:  # which is refused
            return None
        source = self._sessions.look(source_id, request.tenant)
        if source is None:
            raise unknown(source_id)
        return source

    def _prepared(
        self, turn: QueuedTurn, session: Session, mark: Mark, again: Prompt | None
    ) -> Prepared | None:
        """The turn as its session makes it; None where it is going to be, beside this thread."""
        said = (turn.request, mark.last_answer, session.pending_lengths(mark), again)
        if turn.preparation is not None:
            return turn.preparation.result()
        if not self._preparation.takes_long(turn.request):
            return self._preparation.prepare(*said)
        # The session's turns wait for this one: what it was prepared for is what it will find.
        has_form = turn.request.sampling.structured_outputs is not None
        beside = self._compiling if has_form else self._beside
        turn.preparation = beside.submit(self._preparation.prepare, *said)
        turn.preparation.add_done_callback(
            lambda _: self._commands.put(lambda: self._begin_next(session.id))
        )
        return None

    # ... advance ...

    def _launch(self) -> None:
        """Give the device its next step, and one more to go on with where it takes two."""
        # Behind a lost step nothing is planned: it would build on tokens that nobody knows.
        while not self._lost and len(self._in_flight) < self._runner.steps_at_once:
            turns, now = list(self._running.values()), time.monotonic()
            while self._to_try_alone and not self._in_flight:
                suspect = self._to_try_alone.popleft()
                if self._is_running(suspect):
                    turns = [suspect]
                    break
            try:
                if self._in_flight:
                    works = self._scheduler.plan_ahead(turns, self._in_flight[-1], now)
                else:
                    works = self._scheduler.plan(turns, now)
                if not works:
                    return
                step = Step([self._part(work) for work in works], self._memory.take_transfers())
            except Exception as error:  # a fault of ours: planned again, it would only come again
                log.exception("a step could not be planned")
                self._step_failed(turns, error)
                return
            self._in_flight.append(works)
            self._device.compute(step, lambda done: self._commands.put(lambda: self._land(done)))

    def _part(self, work: Work) -> StepPart:
        running = work.running
        choice = running.choice(work.ahead) if work.ends_in_a_token else Choice()
        return step_part(work.ids, running.session, work.tokens_in_flight, choice)

    def _land(self, done: Future[StepResult]) -> None:
        """The device has computed the oldest step in flight."""
        works = self._in_flight.popleft()
        lost, self._lost = self._lost > 0, max(0, self._lost - 1)
        try:
            result = done.result()
        except Exception as error:
            if not lost or isinstance(error, TransferError):
                self._lost = len(self._in_flight)
                self._step_failed([work.running for work in works], error)
            return
        if lost:
            return
        decoding = sum(work.decoding for work in works)
        prompt_tokens = sum(work.count for work in works if not work.decoding)
        self._scheduler.clock.observe(decoding, prompt_tokens, result.seconds)
        for work, token, logprobs in zip(works, result.tokens, result.logprobs, strict=True):
            running = work.running
            # Ended meanwhile, its session has forgotten these tokens or never hears of them.
            if not self._is_running(running) or running.finish_reason:
                continue
            if running.grammar is not None and running.grammar.error is not None:
                self._roll_back(running, running.grammar.error)
                continue
            if token == NO_TOKEN:
                self._memory.forget(running.session)
                self._roll_back(running, SessionError(ErrorCode.INTERNAL, NOT_FINITE))
                continue
            self._memory.extend(running.session, work.count)
            if running.uncomputed:
                continue
            self._with_new_tokens.append(running)
            if running.max_tokens == 0:
                running.finish_reason = "closed" if running.turn.request.end else "prefilled"
                continue
            self._take_token(running, token, logprobs)

    def _take_token(self, running: RunningTurn, token: int, logprobs: TokenLogprobs | None) -> None:
        now = time.monotonic()
        if running.first_token_at is None:
            running.first_token_at = now
            self._statistics.first_token_seconds.observe(now - running.turn.arrived_at)
        else:
            self._statistics.between_tokens_seconds.observe(now - running.last_token_at)
        running.last_token_at = now
        sampling = running.turn.request.sampling
        ends = token in sampling.stop_token_ids
        if (token in self._runner.eos_token_ids and not sampling.ignore_eos) or (
            ends and running.detokenizer.is_invisible(token)
        ):
            running.finish_reason = "stop"
            return
        running.session.tokens.append(token)
        running.unread += 1
        if logprobs is not None:
            running.unread_logprobs.append(logprobs)
        if running.grammar is not None:
            running.grammar.take(token)
            ends = ends or running.grammar.is_complete
        if ends:
            running.finish_reason = "stop"
        elif running.answer_tokens == running.max_tokens:
            running.finish_reason = "length"

    def _step_failed(self, turns: list[RunningTurn], error: Exception) -> None:
        """Only the turn that made a step fail shall fail: several are tried again one by one."""
        if is_lost(self._runner.device):
            # Nobody could ever be answered again, and would be told so one by one. Where this
            # process has ended, whoever watches it starts the server anew.
            log.critical("the device is lost; the process ends", exc_info=error)
            os._exit(1)
        # Also of a turn that has ended meanwhile nobody knows whether it is to blame.
        several = len(turns) > 1 and not isinstance(error, TransferError)
        turns = [running for running in turns if self._is_running(running)]
        if several:
            self._to_try_alone.extend(turns)
            return
        for running in turns:
            self._memory.forget(running.session)
            self._roll_back(running, as_session_error(error))

    def _tell_new_tokens(self) -> None:
        """Turn the last step's tokens into text, and end the turns that ended with them."""
        turns, self._with_new_tokens = self._with_new_tokens, []
        for running in turns:
            if not self._is_running(running):
                continue
            try:
                text = running.read()
                if running.finish_reason:
                    self._complete(running, text)
                elif text:
                    self._tell(running.turn, running.delta(text))
            except Exception as error:
                self._roll_back(running, as_session_error(error))

    # ... and end.

    def _complete(self, running: RunningTurn, text: str = "") -> None:
        turn, session = running.turn, running.session
        text += running.detokenizer.flush()
        final = running.delta(text, running.finish_reason)
        if running.max_tokens and running.detokenizer.stopped:
            self._keep_what_was_shown(running)
        journal = self._journal
        if journal is not None and session.log is not None and session.log.elsewhere:
            self._lose(running)
        elif journal is not None and journal.sync and not turn.request.end:
            running.journaled = True
            journal.write_turn(
                running,
                running.completed() if running.max_tokens else None,
                lambda problem: self._commands.put(
                    lambda: self._journaled(running, final, problem)
                ),
            )
        else:
            self._commit(running, final)
            if journal is not None and not turn.request.end:
                journal.write_turn(running)

    def _journaled(self, running: RunningTurn, final: Delta, problem: Exception | None) -> None:
        """The journal has a turn, or cannot have it."""
        if not self._is_running(running):
            return
        log = running.session.log
        if problem is None:
            self._commit(running, final)
        elif log is not None and log.elsewhere:
            self._lose(running)
        else:
            error = unavailable(
                f"the answer could not be written to the journal ({problem}), so the turn does not "
                "count; ask again later"
            )
            self._roll_back(running, error)

    def _lose(self, running: RunningTurn) -> None:
        """Another server has gone on with a session before this turn was there."""
        running.journaled = False
        self._roll_back(running, gone_elsewhere(running.session.id))
        if self._sessions.look(running.session.id, running.session.tenant) is running.session:
            self._leave_to_another(running.session)

    def _commit(self, running: RunningTurn, final: Delta) -> None:
        """A turn is a part of its session from here on."""
        turn, session, counters = running.turn, running.session, self._statistics
        counters.answer_tokens += final.num_output_tokens
        if running.max_tokens == 0:
            session.pending_images = running.pending_images
        else:
            session.turns.append(running.completed())
            session.pending_images, session.asked = 0, None
        self._sessions.forget_taken_back(session)
        counters.turns_completed += turn.asked_for
        if running.phase is not Phase.NEW:  # else nothing was computed for it
            counters.prompt_tokens_reused += running.cached_tokens
            counters.prompt_tokens_computed += running.prompt_tokens - running.cached_tokens
        if turn.request.end:  # everything is free before the client hears that it is over
            self._sessions.drop(session.id, turn.arrived_at)
        else:
            self._sessions.used(session.id, session.tenant)
        self._tell(turn, final)
        self._leave(turn)

    def _keep_what_was_shown(self, running: RunningTurn) -> None:
        """A stop string has cut an answer, perhaps inside a token: what follows builds on what is
        left of it."""
        session = running.session
        answer = session.tokens[running.prompt_tokens :]
        shown = self._renderer.tokens_of(answer, running.detokenizer.text)
        same = running.prompt_tokens + common_prefix(answer, shown)
        session.tokens[running.prompt_tokens :] = shown
        self._memory.truncate(session, same)

    def _roll_back(self, running: RunningTurn, error: SessionError) -> None:
        """End a turn without an answer: its session is as it was before the turn began."""
        turn, session = running.turn, running.session
        if error.code is ErrorCode.CANCELLED:
            self._statistics.turns_cancelled += 1
        else:
            self._statistics.turns_failed += 1
        if turn.request.start or turn.request.end:
            # Opened by this turn, it has no completed turn to go back to; closed by it, Triton has
            # ended the sequence and nobody can reach it again.
            self._sessions.drop(session.id, turn.arrived_at)
        else:
            session.asked = None
            session.truncate(running.kept)
            self._memory.truncate(session, min(running.remembered, len(session.tokens)))
            self._sessions.forget_images(session, running.kept_mark.images)
            session.come_back()
            if running.journaled and self._journal is not None:
                self._journal.write_session(session)
            self._used(session.id, session.tenant)
        self._tell(turn, error)
        self._leave(turn)

    def _refuse(self, turn: QueuedTurn, error: SessionError) -> None:
        self._statistics.turns_refused += turn.asked_for
        self._tidy(turn)
        self._tell(turn, error)

    def _tidy(self, turn: QueuedTurn) -> None:
        """A turn has not begun: where there is no session, nobody else deletes its pictures."""
        if self._journal is not None and turn.request.image_features:
            self._journal.tidy(turn.request.session_id, turn.request.tenant)

    def _leave(self, turn: QueuedTurn) -> None:
        """Take an ended turn out of its lane; the next one begins at the loop's next pass."""
        self._running.pop(turn.id, None)
        if turn.preparation is not None:
            turn.preparation.cancel()  # it would go on holding the pictures
        if turn.resuming is not None:
            turn.resuming.cancel()
        if self._lanes.leave(turn):
            # As a command, not a call: a long lane of bad turns must not nest this deep.
            self._commands.put(lambda: self._begin_next(turn.request.session_id))

    def _end_over_time(self, running: RunningTurn) -> None:
        if running.answer_tokens:
            running.finish_reason = "time_limit"
            self._complete(running)
        else:
            self._roll_back(running, _too_late(running.turn))

    def _stop_answer(self, session_id: SessionId, tenant: str, listener: Listener) -> None:
        session = self._sessions.look(session_id, tenant)
        if session is None:
            listener(unknown(session_id))
            return
        told = Delta("", "stopped", 0, 0, 0, 0.0)
        head = self._lanes.head(session_id)
        running = self._running.get(head.id) if head is not None else None
        if running is not None and running.max_tokens:
            try:
                if not running.finish_reason:  # else it ends by itself
                    text = running.read()  # of tokens that its listener has not heard of
                    running.finish_reason = running.finish_reason or "stopped"
                    self._complete(running, text)
                told = Delta(
                    *("", "stopped", running.prompt_tokens),
                    *(running.answer_tokens, running.cached_tokens, 0.0),
                    num_forgotten_turns=session.forgotten,
                )
            except Exception as error:
                self._roll_back(running, as_session_error(error))
        listener(told)

    def _cancel_answer(
        self, session_id: SessionId, tenant: str, request_id: str, listener: Listener
    ) -> None:
        for turn in self._lanes.of_session(session_id):
            if (turn.request.tenant, turn.request.request_id) == (tenant, request_id):
                self._cancel(turn.id)
        listener(Delta("", "stopped", 0, 0, 0, 0.0))

    def _cancel(self, turn_id: str) -> None:
        error = SessionError(ErrorCode.CANCELLED, "the turn was cancelled")
        if turn_id in self._running:
            self._roll_back(self._running[turn_id], error)
            return
        for turn in self._lanes.all():
            if turn.id == turn_id:
                self._end_waiting(turn, error)

    def _end_waiting(self, turn: QueuedTurn, error: SessionError) -> None:
        """End a turn that has not begun."""
        if error.code is ErrorCode.CANCELLED:
            self._statistics.turns_cancelled += turn.asked_for
            self._tidy(turn)
            self._tell(turn, error)
        else:
            self._refuse(turn, error)
        if turn.request.end:
            # Triton has ended the sequence: the session ends in this turn's place, when the turns
            # before it are done.
            self._lanes.replace(turn, closing_turn(turn))
        else:
            self._leave(turn)

    def _close_now(self, session_id: SessionId) -> None:
        for turn in reversed(self._lanes.of_session(session_id)):
            self._cancel(turn.id)
        for closing in self._lanes.of_session(session_id):
            self._leave(closing)
        self._sessions.drop(session_id)

    # Little helpers.

    def _is_running(self, running: RunningTurn) -> bool:
        return self._running.get(running.turn.id) is running

    def _idle_sessions(self) -> Iterator[Session]:
        """Sessions that have blocks and no turn, longest unused first."""
        return (each for each in self._memory.on_device() if each.id not in self._lanes)

    def _tell(self, turn: QueuedTurn, event: object) -> None:
        turn.told_at = time.monotonic()
        try:
            turn.listener(event)  # type: ignore[arg-type]
        except Exception:
            log.exception("the listener of turn %s failed", turn.id)

    def _count(self) -> Statistics:
        now = self._statistics.with_state(
            self._memory, self._images, len(self._sessions), len(self._lanes), self._lanes.turns
        )
        now.journal = replace(self._journal.counters) if self._journal is not None else None
        return now


def _not_yours(request: TurnRequest) -> SessionError:
    opens = request.start and not request.operation.resume
    return taken_by_another(request.session_id) if opens else unknown(request.session_id)


def _too_late(turn: QueuedTurn) -> SessionError:
    return unavailable(
        f"the answer had not begun after the {turn.request.sampling.max_seconds:g} seconds that "
        "max_seconds gives it; try again later"
    )
