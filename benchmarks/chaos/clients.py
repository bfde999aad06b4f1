"""Sessions with known answers, whose clients ask again until they are answered."""

from __future__ import annotations

import base64
import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.endpoint import Endpoint, Told
from benchmarks.happenings import Happenings
from benchmarks.pictures import encoded
from benchmarks.soak_clients import QUESTIONS
from demo.data import picture
from demo.shapes import random_scene

SCRIPTS = 12
MAX_TOKENS = 12
PAUSE_SECONDS = (0.0, 2.0)
"""Between an answer and the next question."""
RETRY_SECONDS = 0.3
HUNG_SECONDS = 600.0
"""Whoever waits longer for an answer has lost the session."""


@dataclass
class Script:
    """A picture, questions about it, and what a quiet endpoint answers."""

    picture: bytes
    questions: tuple[str, ...]
    answers: list[str] = field(default_factory=list)


def make_scripts(seed: int) -> list[Script]:
    """Their answers are still to be asked for."""
    rng = random.Random(seed)
    scripts = []
    for _ in range(SCRIPTS):
        shown = encoded(picture(random_scene(rng), rng).convert("RGB"), "PNG")
        scripts.append(Script(shown, tuple(rng.sample(QUESTIONS, len(QUESTIONS)))))
    return scripts


class Tally(Happenings):
    """What has happened, and how long it took."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []
        """Seconds from a question that was not answered at once to its answer."""

    def waited(self, seconds: float) -> None:
        """A question was answered, but not at once."""
        with self._lock:
            self.waits.append(seconds)


class LostError(Exception):
    """The session is gone, or nobody answers."""


class Client(threading.Thread):
    """Holds one session after the other.

    Args:
        endpoint: whom it asks.
        scripts: what its sessions say.
        tally: what becomes of them.
        number: of the client.
        until: on time.monotonic's clock: no session is opened after that.
    """

    numbers = itertools.count()

    def __init__(
        self, endpoint: Endpoint, scripts: list[Script], tally: Tally, number: int, until: float
    ) -> None:
        super().__init__(name=f"client {number}", daemon=True)
        self._endpoint = endpoint
        self._scripts = scripts
        self._tally = tally
        self._rng = random.Random(f"client {number}")
        self._until = until

    def run(self) -> None:
        """See `threading.Thread`."""
        while time.monotonic() < self._until:
            script = self._rng.choice(self._scripts)
            try:
                self.hold(script)
            except LostError as error:
                self._tally.count("lost", str(error))
            except Exception as error:
                self._tally.count("error", repr(error))

    def hold(self, script: Script, *, in_a_hurry: bool = False) -> list[str]:
        """One session; its answers."""
        answers: list[str] = []
        opening = _question(script.questions[0], picture=script.picture)
        session, said = self._opened(opening)
        self._check(script, 0, said)
        answers.append(said)
        for turn in range(1, len(script.questions)):
            if not in_a_hurry:
                time.sleep(self._rng.uniform(*PAUSE_SECONDS))
            said = self._asked(session, script.questions[turn], turn)
            self._check(script, turn, said)
            answers.append(said)
        self._closed(session)
        self._tally.count("sessions")
        return answers

    def _opened(self, opening: dict[str, Any]) -> tuple[str, str]:
        """Opens a session. It counts as open once the client has its ID."""

        def open_it() -> Told:
            told = self._endpoint.ask(opening, "NEW_SESSION")
            if told.status != 200:
                self._tally.count("openings that failed")
            return told

        told = self._until_answered(open_it, "an opening")
        return told.session, told.text

    def _asked(self, session: str, text: str, turn: int) -> str:
        # Asked again, the question takes its own place: an answer may have been lost on its way.
        again = _question(text, rewind=turn)
        asked = itertools.chain([_question(text)], itertools.repeat(again))
        return self._until_answered(
            lambda: self._endpoint.ask(next(asked), session), f"turn {turn} of {session}"
        ).text

    def _closed(self, session: str) -> None:
        closing = {"requestType": "CLOSE"}
        asked = itertools.count()

        def close() -> Told:
            told = self._endpoint.ask(closing, session)
            if next(asked) and told.status == 400 and "session is unknown" in told.text:
                return Told(200, "", "")  # closed, and the answer was lost
            return told

        self._until_answered(close, f"the end of {session}")

    def _until_answered(self, ask: Callable[[], Told], what: str) -> Told:
        began, tries, said = time.monotonic(), 0, ""
        while time.monotonic() - began < HUNG_SECONDS:
            try:
                told = ask()
            except OSError as error:
                said = repr(error)
            else:
                if told.status == 200:
                    self._tally.count("answers")
                    if tries:
                        self._tally.waited(time.monotonic() - began)
                    return told
                said = f"{told.status} {told.text}"
                if told.status == 400:
                    raise LostError(f"{what}: {said}")
            tries += 1
            self._tally.count("asked again")
            time.sleep(RETRY_SECONDS)
        raise LostError(f"{what}: no answer in {HUNG_SECONDS:.0f} s, the last time: {said}")

    def _check(self, script: Script, turn: int, said: str) -> None:
        if script.answers and said != script.answers[turn]:
            right = script.answers[turn]
            self._tally.count("wrong", f"turn {turn}: {said!r} instead of {right!r}")


def learn_answers(endpoint: Endpoint, scripts: list[Script]) -> None:
    """Ask a quiet endpoint."""
    tally = Tally()
    client = Client(endpoint, scripts, tally, 0, 0.0)
    for script in scripts:
        script.answers = client.hold(script, in_a_hurry=True)


def _question(text: str, picture: bytes = b"", rewind: int | None = None) -> dict[str, Any]:
    """Triton's inference request."""
    sampling = json.dumps({"max_tokens": MAX_TOKENS})
    strings = {"text_input": text, "sampling_parameters": sampling}
    if picture:
        strings["image"] = base64.b64encode(picture).decode()
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [1], "data": [value]}
        for name, value in strings.items()
    ]
    parameters = {} if rewind is None else {"rewind": rewind}
    return {"inputs": inputs, "parameters": parameters}
