"""The soak's clients: sessions with known answers that end in every way a session can end."""

from __future__ import annotations

import io
import itertools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from demo.data import picture
from demo.shapes import random_scene
from llava_triton.client.answer import AnswerStream
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.transport import TurnMessage
from llava_triton.errors import ErrorCode, SessionError

PICTURES = 20
TURNS = 3
QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "What do you see in the center?",
    "Which colors are there?",
    "Is there a large circle?",
    "What is at the top left?",
    "How many of the shapes are small?",
)
MAX_TOKENS = 12
"""Of an answer: short ones, for many sessions in little time."""
LONG_QUESTION = "Describe the picture."
LONG = {"max_tokens": 600, "ignore_eos": True}
"""An answer that is still on its way when its client leaves."""
FATES = {"closed": 0.78, "abandoned": 0.17, "disconnected": 0.05}
"""How sessions end, and how often: closed by END; never closed, so that they expire; their client
gone in the middle of an answer. Half of the latter come back and ask again."""
MAX_FAILURES = 200
"""More are not worth waiting for."""
KEPT_SENTENCES = 20


@dataclass
class Script:
    """A picture, questions about it, and what a quiet server answers to them."""

    picture: bytes
    questions: tuple[str, ...]
    answers: list[str] = field(default_factory=list)


def make_scripts() -> list[Script]:
    """One a picture; their answers are still to be asked for."""
    scripts = []
    for number in range(PICTURES):
        rng = random.Random(f"soak {number}")
        buffer = io.BytesIO()
        picture(random_scene(rng), rng).convert("RGB").save(buffer, "PNG")
        scripts.append(Script(buffer.getvalue(), tuple(rng.sample(QUESTIONS, TURNS))))
    return scripts


def learn_answers(address: str, scripts: list[Script]) -> None:
    """Ask a quiet server, one question at a time."""
    transport = GrpcTransport(address)
    try:
        for script in scripts:
            client = Conversation(transport, script, uuid.uuid4().hex)
            script.answers = [
                client.ask(turn, start=turn == 0, end=turn == TURNS - 1, streamed=False)
                for turn in range(TURNS)
            ]
    finally:
        transport.close()


class Conversation:
    """One session from the client's side."""

    def __init__(self, transport: GrpcTransport, script: Script, session_id: int | str) -> None:
        self._transport = transport
        self._script = script
        self.id = session_id

    def open_silently(self) -> None:
        """Send the picture alone."""
        message = TurnMessage(self.id, start=True, images=[self._script.picture])
        self._transport.ask(message)

    def ask(self, turn: int, *, start: bool, end: bool, streamed: bool) -> str:
        """The answer to question number `turn`; the picture goes along with `start`."""
        message = TurnMessage(
            self.id,
            start=start,
            end=end,
            text=self._script.questions[turn],
            images=[self._script.picture] if start else [],
            sampling={"max_tokens": MAX_TOKENS},
        )
        if streamed:
            return "".join(delta.text for delta in self._transport.stream(message))
        return self._transport.ask(message).text

    def answer_to_its_end(self) -> None:
        """Ask for a long answer and stay for all of it."""
        message = TurnMessage(self.id, text=LONG_QUESTION, sampling=LONG)
        for _ in self._transport.stream(message):
            pass

    def leave_an_answer(self, *, start: bool) -> None:
        """Ask for a long answer and disconnect at its first piece."""
        message = TurnMessage(
            self.id,
            start=start,
            text=LONG_QUESTION,
            images=[self._script.picture] if start else [],
            sampling=LONG,
        )
        stream = AnswerStream(self._transport.stream(message))
        next(iter(stream))
        stream.close()

    def close(self) -> None:
        """END, with nothing to answer."""
        self._transport.ask(TurnMessage(self.id, end=True))


class Tally:
    """What happened so far; the clients' threads share it."""

    def __init__(self, sessions: int) -> None:
        self.sessions_wanted = sessions
        self.counts: Counter[str] = Counter()
        self.sentences: list[str] = []
        """The first failures, for a person."""
        self.unexplained: list[tuple[Script, int, str]] = []
        """Answers that do not follow from the session's completed turns, after one was left: the
        script, the turn, what was said."""
        self.first_abandoned: tuple[int | str, float] | None = None
        """A session that nobody closed, and when it was left."""
        self._numbers: Iterator[int] = iter(range(sessions))
        self._lock = threading.Lock()

    def next_number(self) -> int | None:
        """A number for one more session; None when there are enough."""
        with self._lock:
            return None if self.failures > MAX_FAILURES else next(self._numbers, None)

    def count(self, what: str, sentence: str = "") -> None:
        """One more of these."""
        with self._lock:
            self.counts[what] += 1
            if sentence and len(self.sentences) < KEPT_SENTENCES:
                self.sentences.append(f"{what}: {sentence}")

    @property
    def failures(self) -> int:
        """Wrong answers, lost sessions and other errors."""
        return sum(self.counts[kind] for kind in ("wrong", "lost", "error"))

    @property
    def sessions(self) -> int:
        """Sessions that have run their course."""
        return sum(self.counts[fate] for fate in FATES)


def explain(address: str, tally: Tally) -> None:
    """Was an answer that its client left completed all the same? Then the next one follows from it.

    Triton does not always hear of a client that has gone; the turn runs to its end and counts then.
    """
    transport = GrpcTransport(address)
    try:
        for script, turn, said in tally.unexplained:
            again = Conversation(transport, script, uuid.uuid4().hex)
            for earlier in range(turn):
                again.ask(earlier, start=earlier == 0, end=False, streamed=False)
            again.answer_to_its_end()
            if again.ask(turn, start=False, end=True, streamed=False) == said:
                tally.count("ran on")
            else:
                sentence = f"after a left answer, turn {turn}: {said!r}"
                tally.count("wrong", f"{sentence} instead of {script.answers[turn]!r}")
    finally:
        transport.close()


class Clients:
    """Threads that hold one session after the other, a connection each."""

    def __init__(self, address: str, scripts: list[Script], tally: Tally, clients: int) -> None:
        self._address = address
        self._scripts = scripts
        self._tally = tally
        self._deadline = float("inf")
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def start(self, seconds: float) -> None:
        """Begin; no session is opened after so many seconds."""
        self._deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether any client still works."""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        transport = GrpcTransport(self._address)
        while time.monotonic() < self._deadline:
            number = self._tally.next_number()
            if number is None:
                break
            rng = random.Random(f"session {number}")
            fate = rng.choices(list(FATES), list(FATES.values()))[0]
            session_id: int | str = uuid.uuid4().hex if rng.random() < 0.7 else _integer_id()
            script = rng.choice(self._scripts)
            try:
                self._hold(Conversation(transport, script, session_id), script, fate, rng)
            except SessionError as error:
                lost = error.code in (ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE)
                self._tally.count("lost" if lost else "error", f"{fate} {session_id}: {error}")
            except Exception as error:
                self._tally.count("error", f"{fate} {session_id}: {error!r}")
            self._tally.count(fate)
            if fate == "abandoned" and self._tally.first_abandoned is None:
                self._tally.first_abandoned = (session_id, time.monotonic())
        transport.close()

    def _hold(
        self, conversation: Conversation, script: Script, fate: str, rng: random.Random
    ) -> None:
        turns = rng.randint(1, TURNS)
        opened = False
        if rng.random() < 0.5:
            conversation.open_silently()
            opened = True
        # END comes with the last question or alone behind it.
        end_with_question = fate == "closed" and rng.random() < 0.5
        for turn in range(turns):
            last = turn == turns - 1
            if fate == "disconnected" and last:
                conversation.leave_an_answer(start=not opened)
                if not opened or rng.random() < 0.5:
                    return
                end_with_question = True
            said = conversation.ask(
                turn,
                start=not opened,
                end=last and end_with_question,
                streamed=rng.random() < 0.5,
            )
            opened = True
            self._tally.count("answers")
            if said != script.answers[turn] and fate == "disconnected" and last:
                self._tally.unexplained.append((script, turn, said))
            elif said != script.answers[turn]:
                sentence = f"{fate}, turn {turn}: {said!r} instead of {script.answers[turn]!r}"
                self._tally.count("wrong", sentence)
        if fate == "closed" and not end_with_question:
            conversation.close()


_integers = itertools.count(random.SystemRandom().randrange(2**40, 2**62))


def _integer_id() -> int:
    return next(_integers)
