"""`python -m benchmarks.hibernate --sessions N`: more sessions are open than fit into memory.

A real server with room for a few sessions and a journal in a folder. Clients open N sessions side
by side, every tenth with a picture, ask each something, and leave it open. Then random ones are
asked again. Each answer is compared with that of a session that never left the memory, and in the
end all are closed and nothing may be left in the folder. The exit status is 1 if an answer was
wrong, a session was lost or something was left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.export import DEMO, export
from benchmarks.findings import BUILD, ROOT, about, table, write_results
from benchmarks.processes import with_descendants
from llava_triton.client import Session
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.resuming import ResumingTransport
from llava_triton.client.transport import TurnMessage
from llava_triton.server.triton_server import TritonServer, free_ports

PICTURE = ROOT / "examples" / "pictures" / "dark.png"
PICTURE_EVERY = 10
"""Sessions without a picture show what a session costs by itself."""
QUESTIONS = ("What is red?", "Tell me about squares.", "How many are there?", "Is it blue?")
AGAIN = "Why?"
LIMIT: dict[str, Any] = {"max_tokens": 8}
CLIENTS = 8
SETTINGS = {
    "max_sessions": 64,
    # Nothing expires while this runs.
    "session_idle_seconds": 86_400.0,
}


@dataclass(frozen=True)
class Kind:
    """What a session says; all of one kind have the same answers."""

    question: str
    picture: bool

    @classmethod
    def of(cls, number: int) -> Kind:
        """That of a session."""
        return cls(QUESTIONS[number % len(QUESTIONS)], number % PICTURE_EVERY == 0)

    @property
    def images(self) -> Sequence[bytes]:
        """Those it opens with."""
        return (PICTURE.read_bytes(),) if self.picture else ()


def right_answers(url: str) -> dict[Kind, tuple[str, str]]:
    """The two answers of each kind, by sessions that stay in memory."""
    answers = {}
    for kind in {Kind.of(number) for number in range(PICTURE_EVERY * len(QUESTIONS))}:
        with Session.open(url, image=list(kind.images)) as session:
            first, second = session.ask(kind.question, **LIMIT), session.ask(AGAIN, **LIMIT)
        answers[kind] = first.text, second.text
    return answers


class Clients:
    """Sends turns of many sessions over a few connections.

    Args:
        address: `host:port`.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._here = threading.local()
        self._pool = ThreadPoolExecutor(CLIENTS)

    def each(self, numbers: Sequence[int], do: Callable[[ResumingTransport, int], bool]) -> int:
        """Do something for each session, side by side; how often it went wrong."""

        def one(number: int) -> bool:
            if not hasattr(self._here, "transport"):
                self._here.transport = ResumingTransport(GrpcTransport(self._address))
            try:
                return do(self._here.transport, number)
            except Exception as error:
                print(f"session {number}: {error}", file=sys.stderr)
                return False

        return sum(not right for right in self._pool.map(one, numbers))


def measure(sessions: int, asked: int, folder: Path) -> dict[str, Any]:
    """Open so many sessions, ask so many of them again, and close all."""
    repository, journal = BUILD / "repositories" / "hibernate", folder / "journal"
    export(DEMO, repository, {**SETTINGS, "journal": journal.as_uri()})
    with TritonServer(repository, *free_ports(3)) as server:
        right = right_answers(server.grpc_url)
        clients = Clients(server.grpc_address)
        memory = [sum(each.private_mib for each in with_descendants(server.pid))]

        def open_one(transport: ResumingTransport, number: int) -> bool:
            kind = Kind.of(number)
            turn = TurnMessage(f"s-{number}", start=True, text=kind.question, images=kind.images)
            return transport.ask(_limited(turn)).text == right[kind][0]

        waited: list[float] = []

        def ask_again(transport: ResumingTransport, number: int) -> bool:
            began = time.perf_counter()
            answer = transport.ask(_limited(TurnMessage(f"s-{number}", text=AGAIN)))
            waited.append(time.perf_counter() - began)
            return answer.text == right[Kind.of(number)][1]

        def close(transport: ResumingTransport, number: int) -> bool:
            return transport.ask(TurnMessage(f"s-{number}", end=True)).finish_reason == "closed"

        began, wrong = time.perf_counter(), 0
        for part in range(10):
            numbers = range(sessions * part // 10, sessions * (part + 1) // 10)
            wrong += clients.each(numbers, open_one)
            memory.append(sum(each.private_mib for each in with_descendants(server.pid)))
            print(f"{numbers.stop} sessions, {memory[-1]:.0f} MiB of memory", flush=True)
        opening = time.perf_counter() - began
        used = _bytes(journal)
        chosen = random.Random(0).sample(range(sessions), min(asked, sessions))
        wrong += clients.each(chosen, ask_again)
        lost = clients.each(range(sessions), close)
        left = _left(journal)
    return {
        "sessions": sessions,
        "in_memory_at_most": SETTINGS["max_sessions"],
        "sessions_opened_per_second": sessions / opening,
        "memory_before_mib": memory[0],
        "memory_mib": memory[1:],
        "journal_bytes_per_session": used / sessions,
        "asked_again": len(chosen),
        "again_median_ms": 1000.0 * statistics.median(waited),
        "again_worst_ms": 1000.0 * max(waited),
        "wrong_or_failed": wrong,
        "lost": lost,
        "files_left": left,
    }


def _limited(turn: TurnMessage) -> TurnMessage:
    turn.sampling.update(LIMIT)
    return turn


def _bytes(folder: Path) -> int:
    """On the disk, whole blocks."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _left(folder: Path) -> int:
    """Files that are still there when the server has had time to delete them."""
    for _ in range(600):
        left = sum(len(names) for _, _, names in os.walk(folder))
        if not left:
            break
        time.sleep(0.1)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.hibernate", description=__doc__)
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--asked", type=int, default=1000, help="sessions that are asked again")
    parser.add_argument("--output", type=Path, default=BUILD / "hibernate.json")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="llava-hibernate-"))
    try:
        values = measure(options.sessions, options.asked, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [
        [name.replace("_", " "), _shown(value)]
        for name, value in values.items()
        if not isinstance(value, list)
    ]
    rows.append(["memory at the end, MiB", _shown(values["memory_mib"][-1])])
    write_results(options.output, table(["", "value"], rows), values, about())
    return int(bool(values["wrong_or_failed"] or values["lost"] or values["files_left"]))


def _shown(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    sys.exit(main())
