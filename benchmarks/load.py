"""How load is made: turns (`Ask`) are put to anything that answers (`Way`); what came, and when
(`Answer`).

A `Way` is an engine in this process (`engine_way.py`), a server over connections (`TransportWay`)
or transformers (`references.py`). `hold` has whole sessions ask any of them.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from benchmarks.processes import (
    OtherPrograms,
    device_memory_mib,
    this_process,
    with_descendants,
)
from benchmarks.script import WARM_UP
from llava_triton.client.transport import Transport, TurnMessage
from llava_triton.contract.delta import Delta

PATIENCE_SECONDS = 300.0
"""Nothing comes for so long: it hangs."""

Ask: TypeAlias = TurnMessage
"""One turn: the client's own message, because every way can answer that."""


def exactly(tokens: int) -> dict[str, Any]:
    """Sampling parameters of a greedy answer of so many tokens, whatever the model says."""
    return {"max_tokens": tokens, "ignore_eos": True}


@dataclass(eq=False)
class Answer:
    """What came of one turn, and when (seconds by `time.perf_counter`)."""

    asked_at: float = field(default_factory=time.perf_counter)
    """By default now; a way that sends the turn later sets it then."""
    submitted_at: float = 0.0
    """An engine in this process: when it got the turn, with the picture encoded."""
    events: list[tuple[float, Delta]] = field(default_factory=list)
    """Every piece with tokens."""
    text: str = ""
    final: Delta | None = None
    ended_at: float = 0.0
    session: int | str = ""
    """Its ID: the session adapter chooses those of the sessions that it opens."""
    error: Exception | None = None
    ended: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue, repr=False)
    """Gets this answer when nothing more will come; several may share one."""

    def take(self, delta: Delta, at: float | None = None) -> None:
        """A piece has come, now or at that time."""
        now = time.perf_counter() if at is None else at
        self.text += delta.text
        if delta.num_output_tokens:  # else only a heartbeat
            self.events.append((now, delta))
        if delta.is_final:
            self.final, self.ended_at = delta, now

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come."""
        self.error = error
        self.ended.put(self)

    def wait(self) -> Answer:
        """Until it has ended; an error is raised. Not where several share `ended`."""
        self.ended.get(timeout=PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        return self

    @property
    def done(self) -> Delta:
        """The final piece."""
        assert self.final is not None, "the answer has not ended"
        return self.final

    @property
    def first_token_seconds(self) -> float:
        """From the question to the first piece with tokens, else to the end."""
        return (self.events[0][0] if self.events else self.ended_at) - self.asked_at

    @property
    def engines_first_token_at(self) -> float:
        """When the engine in this process had the first token, by its own clock."""
        return self.submitted_at + self.done.first_token_ms / 1000.0

    @property
    def seconds(self) -> float:
        """From the question to the end."""
        return self.ended_at - self.asked_at

    @property
    def between_tokens_seconds(self) -> float | None:
        """Mean, behind the first piece; None where all tokens came in one."""
        return _mean_gap(self.events[0][0], self.events[0][1].num_output_tokens, self)

    def tokens_at(self, when: float) -> int:
        """That had come by then."""
        index = bisect_right(self.events, when, key=lambda event: event[0])
        return self.events[index - 1][1].num_output_tokens if index else 0


def _mean_gap(first_at: float, tokens_then: int, answer: Answer) -> float | None:
    last_at, last = answer.events[-1]
    tokens = last.num_output_tokens - tokens_then
    return (last_at - first_at) / tokens if tokens else None


def joint_tokens_per_second(answers: Sequence[Answer]) -> float | None:
    """Of all answers, while all of them were coming; None where they never were."""
    began = max(answer.events[0][0] for answer in answers)
    ended = min(answer.events[-1][0] for answer in answers)
    tokens = sum(answer.tokens_at(ended) - answer.tokens_at(began) for answer in answers)
    return tokens / (ended - began) if ended > began and tokens else None


class Way(ABC):
    """Takes turns; each answer is waited for by whoever asked."""

    tells_by_engine = False
    """Whether first tokens count by the engine's clock, because nothing lies around the engine."""

    @abstractmethod
    def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        """Ask and return at once; `answer` is filled, by default a new one."""

    def connect(self, session: int | str) -> None:  # noqa: B027 - most need no connection
        """Do beforehand what a session's first turn would have to wait for."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""


def send(transport: Transport, ask: Ask, *, streamed: bool, answer: Answer) -> Answer:
    """Put a turn to a server now and take what comes: its pieces, or the whole answer as one.

    Raises:
        SessionError: whatever went wrong.
    """
    answer.asked_at = time.perf_counter()
    if streamed:
        for delta in transport.stream(ask):
            answer.take(delta)
    else:
        answer.take(transport.ask(ask))
    return answer


class TransportWay(Way):
    """A server, streamed; every session has a connection and a thread of its own until its END.

    Args:
        connect: makes a connection.
    """

    def __init__(self, connect: Callable[[], Transport]) -> None:
        self._connect = connect
        self._sessions: dict[int | str, queue.SimpleQueue[tuple[Ask, Answer] | None]] = {}

    def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        """See `Way`."""
        self.connect(ask.session_id)
        answer = answer or Answer()
        turns = self._sessions[ask.session_id]
        turns.put((ask, answer))
        if ask.end:
            del self._sessions[ask.session_id]
            turns.put(None)
        return answer

    def connect(self, session: int | str) -> None:
        """A connection and a thread for the session, unless it has them."""
        if session not in self._sessions:
            turns = self._sessions[session] = queue.SimpleQueue()
            arguments = (self._connect(), turns)
            threading.Thread(target=_send_all, args=arguments, daemon=True).start()

    def close(self) -> None:
        """Close the connections of sessions that have not ended."""
        while self._sessions:
            self._sessions.popitem()[1].put(None)


def _send_all(transport: Transport, turns: queue.SimpleQueue[tuple[Ask, Answer] | None]) -> None:
    while (turn := turns.get()) is not None:
        ask, answer = turn
        try:
            send(transport, ask, streamed=True, answer=answer)
        except Exception as error:
            answer.end(error)
        else:
            answer.end()
    transport.close()


# Whole sessions.


class Asked(Protocol):
    """What sessions are asked: a `Workload`, or a `Script` where torch is missing."""

    @property
    def turns(self) -> int:
        """Of a session."""

    @property
    def answer_tokens(self) -> int:
        """Of each answer."""

    def picture(self, load: int, session: int) -> bytes:
        """Encoded."""

    def question(self, load: int, session: int, turn: int) -> str:
        """Of a turn."""


@dataclass(frozen=True)
class TurnTimes:
    """One answered turn. Times are in milliseconds."""

    session: int
    turn: int
    first_token_ms: float
    """From being given the question (and picture, encoded) to the first token."""
    between_tokens_ms: float | None
    """Mean over the answer, behind its first piece; None where all came in one."""
    output_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed again."""
    prompt_tokens: int
    """Of the whole prompt: everything said before, the picture, the question."""
    text: str
    """The answer: greedy, so all ways should say the same."""
    around_engine_ms: float = 0.0
    """Of the time to the first token, what passed before the engine had the turn and after it had
    the token: the way through Triton, where there is one."""


@dataclass(frozen=True)
class Load:
    """One way of answering under `sessions` sessions at once, from the first turn to the last."""

    sessions: int
    seconds: float
    peak_mib: float
    """Resident memory at its highest, of all processes that answer, from their start on."""
    turns: list[TurnTimes]
    device_peak_mib: float | None = None
    """Of the GPU's memory, what is in use when the last answer is there: allocators keep what they
    once had. Whoever uses it counts. None without a GPU."""
    others_cores: float = 0.0
    """Of the machine's processors, how many other programs kept busy meanwhile."""

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens of all sessions over the whole time."""
        return sum(turn.output_tokens for turn in self.turns) / self.seconds

    def texts(self, session: int) -> list[str]:
        """A session's answers, in their order."""
        mine = sorted((each.turn, each.text) for each in self.turns if each.session == session)
        return [text for _, text in mine]


def hold(
    way: Way,
    workload: Asked,
    load: int,
    sessions: int,
    turns: int,
    server: int | None = None,
) -> Load:
    """Sessions at once; each asks again when its last answer is complete, and its next time to the
    first token counts from there.

    Args:
        way: who is asked.
        workload: what.
        load: number of this part of the run, which has pictures and questions of its own.
        sessions: how many.
        turns: of each.
        server: process ID of the server whose processes answer; None: this process answers.
    """
    ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    pictures = [workload.picture(load, session) for session in range(sessions)]
    on_their_way: dict[Answer, tuple[int, int]] = {}
    """Session and turn of each."""
    done: list[TurnTimes] = []

    def name(session: int) -> str:
        return f"load-{load}-{session}"

    def ask(session: int, turn: int, asked_at: float) -> None:
        message = Ask(
            name(session),
            start=turn == 0,
            end=turn == turns - 1,
            text=workload.question(load, session, turn),
            images=[pictures[session]] if turn == 0 else [],
            sampling=exactly(workload.answer_tokens),
        )
        answer = Answer(asked_at=asked_at, ended=ended)
        on_their_way[answer] = session, turn
        way.ask(message, answer)

    for session in range(sessions):
        way.connect(name(session))
    others = OtherPrograms()
    began = time.perf_counter()
    for session in range(sessions):
        ask(session, 0, began)  # who is asked one by one keeps the last ones waiting
    while len(done) < sessions * turns:
        answer = ended.get(timeout=PATIENCE_SECONDS)
        session, turn = on_their_way.pop(answer)
        done.append(_times(answer, session, turn, by_engine=way.tells_by_engine))
        if turn + 1 < turns:
            # Not now: a way that answers within `ask` has kept this session waiting.
            ask(session, turn + 1, answer.ended_at)
    seconds = time.perf_counter() - began
    others_cores = others.cores()
    processes = [this_process()] if server is None else with_descendants(server)
    peak = sum(process.peak_mib for process in processes)
    return Load(sessions, seconds, peak, done, device_memory_mib(), others_cores)


def _times(answer: Answer, session: int, turn: int, *, by_engine: bool) -> TurnTimes:
    if answer.error is not None:
        raise answer.error
    final = answer.done
    if by_engine:
        first_at, around_ms = answer.engines_first_token_at, 0.0
        gap = _mean_gap(first_at, 1, answer)
    else:
        first_at, gap = answer.events[0][0], answer.between_tokens_seconds
        around_ms = answer.first_token_seconds * 1000.0 - final.first_token_ms
    return TurnTimes(
        session=session,
        turn=turn,
        first_token_ms=(first_at - answer.asked_at) * 1000.0,
        between_tokens_ms=None if gap is None else gap * 1000.0,
        output_tokens=final.num_output_tokens,
        cached_tokens=final.num_cached_tokens,
        prompt_tokens=final.num_input_tokens,
        text=answer.text,
        around_engine_ms=around_ms,
    )


def hold_all(
    way: Way, workload: Asked, sessions: Sequence[int], server: int | None = None
) -> list[Load]:
    """Warm up, hold every number of sessions, and say so."""
    hold(way, workload, *WARM_UP, 2)
    loads = []
    for count in sessions:
        load = hold(way, workload, count, count, workload.turns, server)
        check_complete(load, workload)
        print(f"{count} at once: {load.tokens_per_second:.1f} tokens/s", flush=True)
        loads.append(load)
    return loads


def check_complete(load: Load, workload: Asked) -> Load:
    """The load, if every answer is there in its full length.

    Raises:
        RuntimeError: one is not, so that the figures would be wrong.
    """
    whole = [turn for turn in load.turns if turn.output_tokens == workload.answer_tokens]
    expected = load.sessions * workload.turns
    if len(whole) != expected or len(load.turns) != expected:
        raise RuntimeError(
            f"{len(load.turns)} answers, {len(whole)} of them with {workload.answer_tokens} "
            f"tokens, came at {load.sessions} sessions; {expected} should have"
        )
    return load


def read_loads(path: Path) -> list[Load]:
    """What `write_loads` wrote."""
    loads = []
    for values in json.loads(path.read_text()):
        turns = [TurnTimes(**turn) for turn in values.pop("turns")]
        loads.append(Load(**values, turns=turns))
    return loads


def write_loads(path: Path, loads: Iterable[Load]) -> None:
    """As JSON."""
    path.write_text(json.dumps([asdict(load) for load in loads], indent=1) + "\n")
