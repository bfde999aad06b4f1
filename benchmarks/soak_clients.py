"""The soak's clients: sessions with known answers that end in every way a session can end."""

from __future__ import annotations

import itertools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from benchmarks.doors import Connection, Door
from benchmarks.happenings import Happenings
from benchmarks.load import Ask
from benchmarks.pictures import encoded
from demo.data import picture
from demo.shapes import random_scene
from llava_triton.contract.errors import ErrorCode, SessionError

SMALL = 20
"""Pictures of a few kilobytes."""
LARGE_MB = (0.1, 0.4, 1.0, 2.5, 4.5, 6.9)
"""Sizes of JPEGs as cameras make them. Few, so that most have been encoded before: what is tried
with them is their transfer."""
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
LONG_QUESTION = "Describe the picture."
LONG = {"max_tokens": 600, "ignore_eos": True}
"""An answer that is still on its way when its client leaves, or its time is over."""
UNSTOPPED = {"max_tokens": 60, "ignore_eos": True}
"""One that goes on when its client has left."""
FATES = ("closed", "abandoned", "disconnected", "timed out")
"""How sessions end: closed by END; never closed, so that they expire; their client gone in the
middle of an answer; a last answer that is cut by `max_seconds`."""
LOST = (ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE)
HUNG_SECONDS = 60.0
"""A request that takes longer is not coming back."""
MAX_FAILURES = 200
"""More are not worth waiting for."""


@dataclass(frozen=True)
class Mix:
    """What sessions are like: shares of 1."""

    fates: dict[str, float]
    pictures: dict[str, float]
    """Of sessions that open on none, a small one or a large one."""
    fewest_turns: int
    most_turns: int
    silent_openings: float
    """The picture alone, before the first question."""
    closed_alone: float
    """Of those closed: END without a question."""
    max_tokens: int
    """Of an answer: short ones, for many sessions in little time."""


EVERY_KIND = Mix(
    fates={"closed": 0.76, "abandoned": 0.14, "disconnected": 0.05, "timed out": 0.05},
    pictures={"none": 0.1, "small": 0.8, "large": 0.1},
    fewest_turns=1,
    most_turns=TURNS,
    silent_openings=0.5,
    closed_alone=0.5,
    max_tokens=12,
)
TWO_REQUESTS = Mix(
    fates={"closed": 1.0},
    pictures={"none": 0.5, "large": 0.5},
    fewest_turns=2,
    most_turns=2,
    silent_openings=0.0,
    closed_alone=0.0,
    max_tokens=6,
)


@dataclass
class Script:
    """A picture, questions about it, and what a quiet server answers to them."""

    kind: str
    """See `Mix.pictures`."""
    picture: bytes | None
    questions: tuple[str, ...]
    max_tokens: int
    answers: list[str] = field(default_factory=list)

    def message(self, session: int | str, turn: int, *, start: bool, end: bool) -> Ask:
        """Question number `turn`; the picture goes along with `start`."""
        text, sampling = self.questions[turn], {"max_tokens": self.max_tokens}
        return Ask(session, start, end, text, self.images(start), sampling)

    def images(self, start: bool) -> list[bytes]:
        """What an opening turn shows."""
        return [self.picture] if start and self.picture else []


def make_scripts(mix: Mix) -> list[Script]:
    """One a picture, of the kinds that the mix has; their answers are still to be asked for."""
    made: list[tuple[str, bytes | None]] = []
    rng = random.Random("soak")
    if "none" in mix.pictures:
        made += [("none", None)] * 3
    if "small" in mix.pictures:
        made += [("small", _small(rng)) for _ in range(SMALL)]
    if "large" in mix.pictures:
        made += [("large", _large(rng, megabytes)) for megabytes in LARGE_MB]
    return [
        Script(kind, file, tuple(rng.sample(QUESTIONS, TURNS)), mix.max_tokens)
        for kind, file in made
    ]


def _small(rng: random.Random) -> bytes:
    return encoded(picture(random_scene(rng), rng).convert("RGB"), "PNG")


def _large(rng: random.Random, megabytes: float) -> bytes:
    """A scene with a sensor's noise, of about 3.5 bits a pixel."""
    side = int((megabytes * 8e6 / 3.5) ** 0.5)
    scene = picture(random_scene(rng), rng).convert("RGB").resize((side, side))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(-12, 13, (side, side, 1))
    pixels = np.clip(np.asarray(scene) + noise, 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG", quality=95)


def hold_whole(connection: Connection, script: Script, turns: int = TURNS) -> list[str]:
    """A session's answers, asked for one after the other."""
    session: int | str = uuid.uuid4().hex
    answers = []
    for turn in range(turns):
        message = script.message(session, turn, start=turn == 0, end=turn == turns - 1)
        said = connection.ask(message)
        session = said.session
        answers.append(said.text)
    return answers


def learn_answers(door: Door, scripts: list[Script]) -> None:
    """Ask a quiet server, one question at a time."""
    connection = Connection(door)
    try:
        for script in scripts:
            script.answers = hold_whole(connection, script)
    finally:
        connection.close()


class Tally(Happenings):
    """What happened so far, by door, and what is still to be done."""

    def __init__(self, sessions: int | None) -> None:
        super().__init__()
        self.sessions_wanted = sessions
        self.answers: Counter[str] = Counter()
        """By door."""
        self.unexplained: list[tuple[Script, int, str]] = []
        """Answers that do not follow from the session's completed turns, after one was left: the
        script, the turn, what was said."""
        self.first_abandoned: tuple[int | str, float] | None = None
        """A session that nobody closed, and when it was left."""
        self._numbers: Iterator[int] = (
            itertools.count() if sessions is None else iter(range(sessions))
        )

    def next_number(self) -> int | None:
        """A number for one more session; None when there are enough."""
        with self._lock:
            return None if self.failures > MAX_FAILURES else next(self._numbers, None)

    def answered(self, door: Door) -> None:
        """One more answer that came through a door."""
        with self._lock:
            self.counts["answers"] += 1
            self.answers[door.name] += 1

    @property
    def failures(self) -> int:
        """Wrong answers, lost sessions, requests that hang and other errors."""
        return sum(self.counts[kind] for kind in ("wrong", "lost", "hung", "error"))

    @property
    def sessions(self) -> int:
        """Sessions that have run their course."""
        return sum(self.counts[fate] for fate in FATES)


def explain(door: Door, tally: Tally) -> None:
    """Was an answer that its client left completed all the same? Then the next one follows from it.

    Triton does not always hear of a client that has gone; the turn runs to its end and counts then.
    """
    connection = Connection(door)
    try:
        for script, turn, said in tally.unexplained:
            again = uuid.uuid4().hex
            for earlier in range(turn):
                connection.ask(script.message(again, earlier, start=earlier == 0, end=False))
            opens = turn == 0  # what was left was the first question behind a silent opening
            images = script.images(opens)
            connection.ask(Ask(again, opens, False, LONG_QUESTION, images, LONG))
            if connection.ask(script.message(again, turn, start=False, end=True)).text == said:
                tally.count("ran on")
            else:
                sentence = f"after a left answer, turn {turn}: {said!r}"
                tally.count("wrong", f"{sentence} instead of {script.answers[turn]!r}")
    finally:
        connection.close()


class Clients:
    """Threads that hold one session after the other.

    Args:
        doors: through which they come.
        scripts: what they say.
        mix: what their sessions are like.
        tally: what becomes of it.
        clients: how many at once.
    """

    def __init__(
        self, doors: Sequence[Door], scripts: list[Script], mix: Mix, tally: Tally, clients: int
    ) -> None:
        self.stopped = False
        self._deadline = float("inf")
        self._clients = [_Client(self, doors, scripts, mix, tally) for _ in range(clients)]

    def start(self, seconds: float) -> None:
        """Begin; no session is opened after so many seconds."""
        self._deadline = time.monotonic() + seconds
        for client in self._clients:
            client.start()

    def stop(self) -> None:
        """Open no more sessions; what happens to the others counts no more."""
        self.stopped = True

    @property
    def may_open(self) -> bool:
        """Whether there is time for more sessions."""
        return not self.stopped and time.monotonic() < self._deadline

    @property
    def running(self) -> bool:
        """Whether any client still works."""
        return any(client.is_alive() for client in self._clients)

    def hung(self) -> list[str]:
        """What the requests are doing that do not come back."""
        since = time.monotonic() - HUNG_SECONDS
        return [each.doing for each in self._clients if each.doing and each.asked_at < since]


class _Client(threading.Thread):
    """One of them, with a connection through every door that it has used."""

    def __init__(
        self,
        clients: Clients,
        doors: Sequence[Door],
        scripts: list[Script],
        mix: Mix,
        tally: Tally,
    ) -> None:
        super().__init__(daemon=True)
        self.doing = ""
        """The request that is in flight."""
        self.asked_at = 0.0
        self._clients = clients
        self._doors = doors
        self._scripts = {
            kind: [script for script in scripts if script.kind == kind] for kind in mix.pictures
        }
        self._mix = mix
        self._tally = tally
        self._connections: dict[str, Connection] = {}

    def run(self) -> None:
        while self._clients.may_open:
            number = self._tally.next_number()
            if number is None:
                break
            rng = random.Random(f"session {number}")
            fate = _drawn(rng, self._mix.fates)
            session = _Session(self, self._doors, rng)
            script = rng.choice(self._scripts[_drawn(rng, self._mix.pictures)])
            try:
                self._hold(session, script, fate, rng)
            except Exception as error:
                if self._clients.stopped:
                    break
                lost = isinstance(error, SessionError) and error.code in LOST
                what = f"{fate} {session.id} ({script.kind} picture), {self.doing}: {error!r}"
                self._tally.count("lost" if lost else "error", what)
            self._tally.count(fate)
            if fate == "abandoned" and self._tally.first_abandoned is None:
                self._tally.first_abandoned = (session.id, time.monotonic())
        self.doing = ""
        for connection in self._connections.values():
            connection.close()

    def through(self, door: Door, doing: str) -> Connection:
        """A connection for one request, which begins now."""
        self.doing, self.asked_at = f"{doing} through {door.name}", time.monotonic()
        self._tally.count("requests")
        if door.name not in self._connections:
            self._connections[door.name] = Connection(door)
        return self._connections[door.name]

    def _hold(self, session: _Session, script: Script, fate: str, rng: random.Random) -> None:
        mix = self._mix
        turns = rng.randint(mix.fewest_turns, mix.most_turns)
        # END comes with the last question or alone behind it.
        end_with_question = fate == "closed" and rng.random() >= mix.closed_alone
        if script.picture and rng.random() < mix.silent_openings:
            session.open_silently(script)
        for turn in range(turns):
            last = turn == turns - 1
            if fate == "disconnected" and last:
                opened = session.opened
                if not session.leave_an_answer(script):
                    return  # nobody knows whether it counts
                if not opened or rng.random() < 0.5:
                    return
                end_with_question = True
            if fate == "timed out" and last:
                said = session.ask_in_a_hurry(script, turn, rng)
                if said is None:
                    self._tally.count("too late")
                else:
                    self._compare_start(said, script, turn)
                return
            door, said = session.ask(script, turn, end=last and end_with_question)
            self._tally.answered(door)
            if said != script.answers[turn] and fate == "disconnected" and last:
                self._tally.unexplained.append((script, turn, said))
            elif said != script.answers[turn]:
                sentence = f"{said!r} instead of {script.answers[turn]!r}"
                self._tally.count("wrong", f"{fate}, turn {turn}, {self.doing}: {sentence}")
        if fate == "closed" and not end_with_question:
            session.close()

    def _compare_start(self, said: str, script: Script, turn: int) -> None:
        right = script.answers[turn]
        if not (said.startswith(right) or right.startswith(said)):
            sentence = f"{said!r} begins otherwise than {right!r}"
            self._tally.count("wrong", f"cut, turn {turn}, {self.doing}: {sentence}")


class _Session:
    """One session from the client's side; each of its requests takes another door."""

    def __init__(self, client: _Client, doors: Sequence[Door], rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        side = rng.choice(doors).side
        self._doors = [door for door in doors if door.side == side]
        self.id: int | str = uuid.uuid4().hex if rng.random() < 0.7 else next(_integers)
        self.opened = False

    def open_silently(self, script: Script) -> None:
        """Send the picture alone."""
        connection, _ = self._next("an opening")
        self.id = connection.ask(Ask(self.id, True, images=script.images(True))).session
        self.opened = True

    def ask(self, script: Script, turn: int, *, end: bool) -> tuple[Door, str]:
        """The answer to question number `turn`, and the door that it came through."""
        connection, door = self._next(f"question {turn}")
        said = connection.ask(script.message(self.id, turn, start=not self.opened, end=end))
        self.id, self.opened = said.session, True
        return door, said.text

    def ask_in_a_hurry(self, script: Script, turn: int, rng: random.Random) -> str | None:
        """As much of the answer as comes in time; that ends the session. None where the server says
        that it has not begun by then: under so many clients one must be ready for that."""
        connection, _ = self._next("a cut answer")
        start = not self.opened
        sampling = {**LONG, "max_seconds": rng.uniform(0.05, 0.4)}
        text, images = script.questions[turn], script.images(start)
        try:
            return connection.ask(Ask(self.id, start, True, text, images, sampling)).text
        except SessionError as error:
            if error.code is ErrorCode.UNAVAILABLE and "max_seconds" in error.sentence:
                return None
            raise

    def leave_an_answer(self, script: Script) -> bool:
        """Ask for a long answer and go in the middle of it; whether that cancels the turn."""
        connection, door = self._next("an answer to be left")
        sampling = LONG if door.cancels else UNSTOPPED
        images = script.images(not self.opened)
        connection.leave(Ask(self.id, not self.opened, False, LONG_QUESTION, images, sampling))
        return door.cancels

    def close(self) -> None:
        """END, with nothing to answer."""
        connection, _ = self._next("an END")
        connection.ask(Ask(self.id, end=True))

    def _next(self, doing: str) -> tuple[Connection, Door]:
        door = self._rng.choice(self._doors)
        return self._client.through(door, doing), door


_integers = itertools.count(random.SystemRandom().randrange(2**40, 2**62))


def _drawn(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]
