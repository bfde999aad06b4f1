"""What an attack is, and what attacks are made of."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from benchmarks.doors import Connection, Door
from benchmarks.load import Ask
from benchmarks.stand import Stand, request
from llava_triton.contract.errors import SessionError

Play = Callable[[], Counter[str]]
"""Does it; what it was answered: statuses, codes or words, and how often."""


class UnsafeError(Exception):
    """An answer that should not have been given; says what is wrong with it."""


@dataclass(frozen=True)
class Attack:
    """One of the suite's."""

    name: str
    title: str
    prepare: Callable[[Stand], Play]
    """Makes what it sends, before the honest clients' time is taken."""
    right: str
    """A pattern that every answer has to match."""
    cheap: bool
    """Done within a few seconds."""
    alone: bool
    """It takes what honest clients need, or stops the server: they are not looked at meanwhile."""

    def unexpected(self, answered: Counter[str]) -> list[str]:
        """Answers that it should not have got."""
        return [answer for answer in answered if not re.fullmatch(self.right, answer)]


ATTACKS: list[Attack] = []


def attack(
    name: str, *, right: str, cheap: bool = False, alone: bool = False
) -> Callable[[Callable[[Stand], Play]], Callable[[Stand], Play]]:
    """Puts a function among the attacks; the first line of its docstring is the title."""

    def register(prepare: Callable[[Stand], Play]) -> Callable[[Stand], Play]:
        title = (prepare.__doc__ or name).splitlines()[0].rstrip(".")
        ATTACKS.append(Attack(name, title, prepare, right, cheap, alone))
        return prepare

    return register


def side_by_side(calls: Sequence[Callable[[], str]]) -> Counter[str]:
    """All at once, a thread each; what they were answered."""
    answered: Counter[str] = Counter()
    lock = threading.Lock()

    def run(call: Callable[[], str]) -> None:
        try:
            said = call()
        except UnsafeError as error:
            said = f"unsafe: {error}"
        with lock:
            answered[said] += 1

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered


def post(
    port: int, path: str, body: bytes | None, headers: dict[str, str], method: str = "POST"
) -> tuple[str, bytes]:
    """One request; its status (`closed` where the connection ended) and the answer."""
    try:
        answer = request(port, path, body, headers, method)
    except TimeoutError:
        return "hung", b""
    except (OSError, http.client.HTTPException):
        return "closed", b""
    return str(answer.status), answer.body


def invoke(stand: Stand, body: bytes, headers: dict[str, str] | None = None) -> str:
    """A JSON body for the adapter; the status and, of an error, the code."""
    headers = {"Content-Type": "application/json"} | (headers or {})
    status, answer = post(stand.adapter_port, "/invocations", body, headers)
    with suppress(ValueError, LookupError, TypeError):
        status = f"{status} {json.loads(answer)['error']['code']}"
    return status


@contextmanager
def connected(door: Door) -> Iterator[Connection]:
    """A connection through a door."""
    connection = Connection(door)
    try:
        yield connection
    finally:
        connection.close()


def ask(door: Door, turn: Ask) -> str:
    """One turn over a connection of its own: `OK` or the error's code."""
    with connected(door) as connection:
        try:
            connection.ask(turn)
        except SessionError as error:
            return error.code.name
        return "OK"


def raw(port: int) -> socket.socket:
    """A connection to write to as one likes."""
    return socket.create_connection(("127.0.0.1", port), timeout=10.0)
