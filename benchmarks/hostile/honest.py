"""Honest clients, one through each door, in a process of their own: how long do they wait?"""

from __future__ import annotations

import multiprocessing
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe

from benchmarks.doors import Connection, Door, doors_of
from benchmarks.load import Ask
from benchmarks.soak_clients import Script
from benchmarks.stand import ping
from llava_triton.contract.errors import SessionError
from llava_triton.server.triton_server import TritonServer

TURNS = 2
THINK_SECONDS = 0.05
PING_SECONDS = 0.25
PATIENCE_SECONDS = 5.0
"""For an answer of /ping; SageMaker waits 2 s."""


@dataclass
class Seen:
    """What happened to them in a while."""

    first_tokens: dict[str, list[float]] = field(default_factory=dict)
    """Seconds to the first token (of doors that do not stream: to the answer's end), by door."""
    failures: list[str] = field(default_factory=list)
    """Wrong answers and errors."""
    pings: list[tuple[int, float]] = field(default_factory=list)
    """Status, 0 for none, and seconds."""


class HonestClients:
    """From `start` on they hold sessions without end, each opened on a file nobody has shown yet.

    Args:
        server: an object that tells the server's addresses.
        adapter_port: the adapter's.
        names: the doors.
        scripts: what they say, with the right answers.
    """

    def __init__(
        self, server: TritonServer, adapter_port: int, names: Sequence[str], scripts: list[Script]
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        addresses = TritonServer(".", *server.ports.values())
        arguments = (theirs, addresses, adapter_port, tuple(names), scripts)
        self._process = spawn.Process(target=_run, args=arguments, daemon=True)

    def __enter__(self) -> HonestClients:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def seen(self) -> Seen:
        """What happened since this was asked last."""
        self._pipe.send(None)
        seen: Seen = self._pipe.recv()
        return seen


def _run(
    pipe: Pipe, server: TritonServer, adapter_port: int, names: Sequence[str], scripts: list[Script]
) -> None:
    doors = doors_of(server, adapter_port)
    notes = _Notes()
    for name in names:
        arguments = (doors[name], scripts, notes)
        threading.Thread(target=_converse, args=arguments, daemon=True).start()
    threading.Thread(target=_ping, args=(adapter_port, notes), daemon=True).start()
    while True:
        pipe.recv()
        pipe.send(notes.take())


class _Notes:
    """What the threads saw."""

    def __init__(self) -> None:
        self._seen = Seen()
        self._lock = threading.Lock()

    def first_token(self, door: str, seconds: float) -> None:
        with self._lock:
            self._seen.first_tokens.setdefault(door, []).append(seconds)

    def failure(self, sentence: str) -> None:
        with self._lock:
            self._seen.failures.append(sentence)

    def ping(self, status: int, seconds: float) -> None:
        with self._lock:
            self._seen.pings.append((status, seconds))

    def take(self) -> Seen:
        with self._lock:
            seen, self._seen = self._seen, Seen()
        return seen


def _converse(door: Door, scripts: list[Script], notes: _Notes) -> None:
    number = 0
    while True:
        connection = Connection(door)
        try:
            while True:
                number += 1
                _hold(connection, door, scripts[number % len(scripts)], notes)
        except SessionError as error:
            notes.failure(f"{door.name}: {error}")
        except Exception as error:
            notes.failure(f"{door.name}: {error!r}")
        finally:
            connection.close()
        time.sleep(4 * THINK_SECONDS)


def _hold(connection: Connection, door: Door, script: Script, notes: _Notes) -> None:
    session: int | str = uuid.uuid4().hex
    assert script.picture is not None
    unseen = _with_note(script.picture, uuid.uuid4().hex)
    for turn in range(TURNS):
        message = script.message(session, turn, start=turn == 0, end=False)
        if turn == 0:
            message = replace(message, images=[unseen])
        said = connection.ask(message)
        session = said.session
        notes.first_token(door.name, said.first_token_seconds)
        if said.text != script.answers[turn]:
            notes.failure(f"{door.name}: {said.text!r} instead of {script.answers[turn]!r}")
        time.sleep(THINK_SECONDS)
    connection.ask(Ask(session, end=True))


def _with_note(png: bytes, note: str) -> bytes:
    """Another file of the same picture: it is decoded and encoded again, with the same result."""
    body = b"tEXtnote\0" + note.encode()
    end = png.rindex(b"IEND") - 4
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:end] + chunk + png[end:]


def _ping(port: int, notes: _Notes) -> None:
    while True:
        began = time.monotonic()
        status = ping(port, PATIENCE_SECONDS)
        took = time.monotonic() - began
        notes.ping(status, took)
        time.sleep(max(0.0, PING_SECONDS - took))
