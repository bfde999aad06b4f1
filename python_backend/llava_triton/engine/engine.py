"""The engine: one thread that owns every session and advances every turn, step by step."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from llava_triton.conversation import ConversationRenderer
from llava_triton.detokenizer import Detokenizer
from llava_triton.engine.model_runner import ModelRunner
from llava_triton.engine.session import Session, SessionId
from llava_triton.engine.turn import Listener, RunningTurn, Statistics, Turn, TurnRequest
from llava_triton.errors import (
    ErrorCode,
    SessionError,
    as_session_error,
    invalid,
    not_found,
    unavailable,
)
from llava_triton.sampling import Sampler
from llava_triton.settings import Settings

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
"""How often the engine looks for expired sessions."""


class Engine:
    """Answers turns of many sessions at once.

    All public methods may be called from any thread and return at once; the engine's own thread
    does the work. Each session's turns run one after another in the order they came; the running
    turns of different sessions advance in turn, a token or a piece of a prompt at a time.

    Args:
        runner: the language model; it is the engine's alone from now on.
        tokenizer: the checkpoint's tokenizer.
        settings: limits.
        clock: seconds, for idle limits and lifetimes.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: object,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._settings = settings
        self._clock = clock
        self._renderer = ConversationRenderer(
            tokenizer, runner.image_token_id, runner.tokens_per_image
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sessions: dict[SessionId, Session] = {}
        # Turns of one session in the order they came; the first one may be running.
        self._lanes: dict[SessionId, deque[Turn]] = {}
        self._running: dict[str, RunningTurn] = {}
        self._next_sweep_at = 0.0
        self._statistics = Statistics()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What callers do.

    def submit(self, request: TurnRequest, listener: Listener) -> str:
        """Take a turn; `listener` gets the pieces of its answer, or one error.

        Returns:
            The turn's ID, known to its caller alone.
        """
        turn = Turn(request, listener)
        self._commands.put(lambda: self._enqueue(turn))
        return turn.id

    def cancel(self, turn_id: str) -> None:
        """Stop a turn; its session goes back to its last completed turn. Unknown IDs are fine."""
        self._commands.put(lambda: self._cancel(turn_id))

    def close(self, session_id: SessionId) -> None:
        """Cancel a session's turns and free everything it holds. Unknown IDs are fine."""
        self._commands.put(lambda: self._close_now(session_id))

    def statistics(self) -> Statistics:
        """A snapshot of the engine's counters."""
        return replace(
            self._statistics,
            sessions_open=len(self._sessions),
            turns_in_flight=sum(len(lane) for lane in list(self._lanes.values())),
        )

    def shutdown(self) -> None:
        """Stop the thread and free all sessions; turns in flight fail with UNAVAILABLE."""
        self._commands.put(self._stop)
        self._thread.join()

    # The loop.

    def _run(self) -> None:
        while not self._stopping:
            self._take_commands()
            self._advance_all()
            self._expire_sessions()
        for lane in list(self._lanes.values()):
            for turn in lane:
                self._tell(turn, unavailable("the server is shutting down"))
        self._lanes.clear()
        self._running.clear()
        self._sessions.clear()

    def _advance_all(self) -> None:
        for running in list(self._running.values()):
            self._attempt(running, self._advance)

    def _take_commands(self) -> None:
        """Do what callers asked for; with no turn to advance, wait until one asks."""
        try:
            idle = not self._running
            command = self._commands.get(block=idle, timeout=SWEEP_SECONDS if idle else None)
            while True:
                self._do(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _do(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # the thread must live: every session depends on it
            log.exception("a command of a caller failed")

    def _stop(self) -> None:
        self._stopping = True

    # Turns begin ...

    def _enqueue(self, turn: Turn) -> None:
        limit = self._settings.max_queued_turns
        waiting = sum(len(lane) for lane in self._lanes.values())
        if waiting >= limit and not turn.request.end:  # an END makes room
            self._refuse(turn, unavailable(f"{limit} turns are waiting already; try again later"))
            return
        lane = self._lanes.setdefault(turn.request.session_id, deque())
        lane.append(turn)
        self._start_head(turn.request.session_id)

    def _start_head(self, session_id: SessionId) -> None:
        """Begin the first turn in a session's lane, unless it runs already."""
        lane = self._lanes.get(session_id)
        if not lane or lane[0].id in self._running:
            return
        turn = lane[0]
        try:
            session = self._session_for(turn.request)
            running = self._prepare(turn, session)
        except Exception as error:
            if turn.request.end:
                self._drop(session_id)  # Triton has ended the sequence: nobody can reach it again
            elif session_id in self._sessions:
                # Triton has begun to count anew; see Settings.triton_idle_microseconds.
                self._sessions[session_id].last_used_at = self._clock()
            self._refuse(turn, as_session_error(error))
            self._leave(turn)
            return
        if turn.request.start:
            self._drop(session_id)
            self._sessions[session_id] = session
            self._statistics.sessions_opened += 1
        # From here on the turn changes its session, and `_fail` undoes it.
        self._running[turn.id] = running
        self._attempt(running, self._begin)

    def _begin(self, running: RunningTurn) -> None:
        request, session = running.turn.request, running.session
        session.truncate(running.cached_tokens)
        if request.image_features is not None:
            session.image_features.append(self._runner.features_on_device(request.image_features))
        if request.text is None and request.image_features is None:
            self._complete(running, "closed" if request.end else "prefilled")

    def _session_for(self, request: TurnRequest) -> Session:
        session = self._sessions.get(request.session_id)
        now = self._clock()
        if session is not None and self._expires_at(session) <= now:
            self._expire(session)
            session = None
        if request.start:
            if session is None and len(self._sessions) >= self._settings.max_sessions:
                raise unavailable(
                    f"all {self._settings.max_sessions} sessions are in use; try again later"
                )
            return Session(request.session_id, opened_at=now, last_used_at=now)
        if session is None:
            raise not_found(
                f"session {request.session_id!r} is unknown or has expired; open a new one by a "
                "request with the sequence start flag"
            )
        if request.text is None and request.image_features is None and not request.end:
            raise invalid(
                "the turn has neither text_input nor image; send a question, a picture or both"
            )
        return session

    def _prepare(self, turn: Turn, session: Session) -> RunningTurn:
        """Work out what a turn has to compute, changing nothing."""
        request, runner = turn.request, self._runner
        new_images = 0
        if request.image_features is not None:
            new_images, per_image, width = request.image_features.shape
            if (per_image, width) != (runner.tokens_per_image, runner.hidden_size):
                raise invalid(
                    f"image_features has the shape {tuple(request.image_features.shape)}; this "
                    f"model takes [N, {runner.tokens_per_image}, {runner.hidden_size}]"
                )
        images = session.pending_images + new_images
        prompt = self._renderer.prompt(session.history, session.last_answer, request.text, images)
        wanted = request.sampling.max_tokens or self._settings.default_max_tokens
        room = runner.context_length - len(prompt)
        if room < (0 if request.text is None else 1):
            raise invalid(
                f"the conversation would be {len(prompt)} tokens long and the model's context is "
                f"{runner.context_length}; shorten the text or open a new session"
            )
        cached = session.reusable_prefix(prompt)
        if request.text is not None:
            cached = min(cached, len(prompt) - 1)  # the last token's logits begin the answer
        return RunningTurn(
            turn=turn,
            session=session,
            prompt=prompt,
            cached_tokens=cached,
            features_before=len(session.image_features),
            images=images,
            max_tokens=0 if request.text is None else min(wanted, room),
            sampler=Sampler(request.sampling),
            detokenizer=Detokenizer(self._tokenizer, request.sampling.stop),
        )

    # ... advance ...

    def _attempt(self, running: RunningTurn, action: Callable[[RunningTurn], None]) -> None:
        """Do something for a turn; where that fails, only this turn fails."""
        try:
            action(running)
        except Exception as error:
            try:
                self._fail(running, as_session_error(error))
            except Exception:  # the session is in an unknown state, the others are not
                log.exception("turn %s could not be undone; its session is closed", running.turn.id)
                self._drop(running.session.id)
                self._tell(running.turn, as_session_error(error))
                self._leave(running.turn)

    def _advance(self, running: RunningTurn) -> None:
        """Compute one piece of a turn's prompt, or its next token."""
        ids = running.uncomputed[: self._settings.prefill_chunk_tokens]
        logits = self._compute(running.session, ids)
        if running.uncomputed:
            return
        if running.max_tokens == 0:
            self._complete(running, "closed" if running.turn.request.end else "prefilled")
            return
        token = running.sampler.sample(logits)
        if running.first_token_at is None:
            running.first_token_at = time.monotonic()
        self._take_token(running, token)

    def _compute(self, session: Session, ids: list[int]) -> torch.Tensor:
        image_token = self._runner.image_token_id
        features = None
        if image_token in ids:
            first = session.cached_ids.count(image_token)
            features = session.features_between(first, first + ids.count(image_token))
        logits = self._runner.forward(session.key_values, ids, features)
        session.cached_ids.extend(ids)
        return logits

    def _take_token(self, running: RunningTurn, token: int) -> None:
        ignore_eos = running.turn.request.sampling.ignore_eos
        if token in self._runner.eos_token_ids and not ignore_eos:
            self._complete(running, "stop")
            return
        running.answer.append(token)
        text = running.detokenizer.push(token)
        if running.detokenizer.stopped:
            self._complete(running, "stop", text)
        elif len(running.answer) == running.max_tokens:
            self._complete(running, "length", text)
        elif text:
            self._tell(running.turn, running.delta(text, ""))

    # ... and end.

    def _complete(self, running: RunningTurn, finish_reason: str, text: str = "") -> None:
        turn, session = running.turn, running.session
        text += running.detokenizer.flush()
        if running.max_tokens == 0:
            session.pending_images = running.images
        else:
            shown = running.detokenizer.text
            answer = running.answer
            if running.detokenizer.stopped:
                answer = self._renderer.tokens_of(answer, shown)
            session.history = [*running.prompt, *answer]
            session.last_answer = shown
            session.pending_images = 0
        session.last_used_at = self._clock()
        counters = self._statistics
        counters.turns_completed += 1
        if finish_reason != "closed":
            counters.prompt_tokens_reused += running.cached_tokens
            counters.prompt_tokens_computed += len(running.prompt) - running.cached_tokens
        counters.answer_tokens += len(running.answer)
        if turn.request.end:  # everything is free before the client hears that it is over
            self._drop(session.id)
        self._tell(turn, running.delta(text, finish_reason))
        self._leave(turn)

    def _fail(self, running: RunningTurn, error: SessionError) -> None:
        """End a turn without an answer: its session is as it was before the turn began."""
        turn, session = running.turn, running.session
        if error.code is ErrorCode.CANCELLED:
            self._statistics.turns_cancelled += 1
        else:
            self._statistics.turns_failed += 1
        if turn.request.start or turn.request.end:
            # Opened by this turn, it has no completed turn to go back to; closed by it, Triton has
            # ended the sequence and nobody can reach it again.
            self._drop(session.id)
        else:
            session.truncate(min(running.cached_tokens, len(session.cached_ids)))
            del session.image_features[running.features_before :]
            session.last_used_at = self._clock()
        self._tell(turn, error)
        self._leave(turn)

    def _refuse(self, turn: Turn, error: SessionError) -> None:
        self._statistics.turns_failed += 1
        self._tell(turn, error)

    def _leave(self, turn: Turn) -> None:
        """Take an ended turn out of its lane; the next one begins at the loop's next pass."""
        self._running.pop(turn.id, None)
        session_id = turn.request.session_id
        lane = self._lanes[session_id]
        lane.remove(turn)
        if lane:
            # As a command, not a call: a long lane of bad turns must not nest this deep.
            self._commands.put(lambda: self._start_head(session_id))
        else:
            del self._lanes[session_id]

    def _cancel(self, turn_id: str) -> None:
        error = SessionError(ErrorCode.CANCELLED, "the turn was cancelled")
        if turn_id in self._running:
            self._fail(self._running[turn_id], error)
            return
        waiting = [turn for lane in self._lanes.values() for turn in lane if turn.id == turn_id]
        for turn in waiting:
            self._statistics.turns_cancelled += 1
            if turn.request.end:
                self._drop(turn.request.session_id)
            self._tell(turn, error)
            self._leave(turn)

    def _close_now(self, session_id: SessionId) -> None:
        for turn in list(self._lanes.get(session_id, ()))[::-1]:
            self._cancel(turn.id)
        self._drop(session_id)

    def _drop(self, session_id: SessionId) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.free()
            self._statistics.sessions_closed += 1

    def _tell(self, turn: Turn, event: object) -> None:
        try:
            turn.listener(event)  # type: ignore[arg-type]
        except Exception:
            log.exception("the listener of turn %s failed", turn.id)

    # Lifetimes.

    def _expires_at(self, session: Session) -> float:
        return min(
            session.last_used_at + self._settings.engine_idle_seconds,
            session.opened_at + self._settings.session_lifetime_seconds,
        )

    def _expire_sessions(self) -> None:
        now = self._clock()
        if now < self._next_sweep_at:
            return
        self._next_sweep_at = now + SWEEP_SECONDS
        for session in list(self._sessions.values()):
            if session.id not in self._lanes and self._expires_at(session) <= now:
                self._expire(session)

    def _expire(self, session: Session) -> None:
        self._drop(session.id)
        self._statistics.sessions_expired += 1
