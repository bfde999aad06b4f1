"""Faults that come of themselves, or of another user of the machine."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.hostile.attack import Play, UnsafeError, ask, attack, connected, side_by_side
from benchmarks.load import Ask
from benchmarks.stand import Stand
from llava_triton.contract.errors import SessionError
from llava_triton.server.restarts import POLL_SECONDS
from llava_triton.server.triton_server import (
    ServerError,
    TritonServer,
    free_ports,
)

FROZEN_SECONDS = 2.0
LONG_ANSWER = {"max_tokens": 700, "ignore_eos": True}
STREAMS = 400


@attack("F2", right="OK", alone=True)
def frozen(stand: Stand) -> Play:
    """A model's process is frozen: found and started anew, before Triton would crash of it."""

    def play() -> Counter[str]:
        os.kill(stand.watch.pid_of("language_model"), signal.SIGSTOP)
        began, found = time.monotonic(), None
        while found is None and time.monotonic() < began + FROZEN_SECONDS:
            time.sleep(POLL_SECONDS)
            found = stand.server.fault()  # what `serve` and the container ask as often
        if found is None or "language_model" not in found:
            raise UnsafeError(f"the watch says {found!r}")
        stand.restart()
        turn = Ask(uuid.uuid4().hex, True, True, "Hi", sampling={"max_tokens": 1})
        return Counter({ask(stand.doors["grpc"], turn): 1})

    return play


@attack("F3", right="OK")
def longer_than_idle(stand: Stand) -> Play:
    """Answers that take longer than the idle limit, and a turn after each."""

    def call() -> str:
        session = uuid.uuid4().hex
        with connected(stand.doors["grpc-stream"]) as connection:
            turn = Ask(session, True, text="Describe it.", sampling=LONG_ANSWER)
            connection.ask(turn)
            try:
                connection.ask(Ask(session, end=True, text="And?"))
            except SessionError as error:
                return error.code.name
        return "OK"

    return lambda: side_by_side([call] * 12)


@attack("F4", right="OK", cheap=True)
def foreign_folder(stand: Stand) -> Play:
    """A folder named like the beginning of the server's run folder, when another server starts."""

    def play() -> Counter[str]:
        regions = {path.name for path in Path("/dev/shm").glob("llava-triton-server-*")}
        names = {name.rsplit("-", 1)[0][:-1] for name in regions}
        folders = [Path(tempfile.gettempdir()) / name for name in names]
        repository = Path(tempfile.mkdtemp(prefix="hostile-"))
        (repository / "nothing").mkdir()
        (repository / "nothing" / "config.pbtxt").write_text("no configuration")
        try:
            for folder in folders:
                folder.mkdir()
                (folder / "guard.lock").touch()
            with suppress(ServerError):
                TritonServer(repository, *free_ports(3)).start(timeout=10.0)
        finally:
            for folder in folders:
                with suppress(OSError):
                    (folder / "guard.lock").unlink()
                with suppress(OSError):
                    folder.rmdir()
            (repository / "nothing" / "config.pbtxt").unlink()
            (repository / "nothing").rmdir()
            repository.rmdir()
        return Counter({"OK": 1})

    return play


@attack("F5", right=r"OK|\d+ in flight for ever by Triton's count", alone=True)
def left_at_once(stand: Stand) -> Play:
    """400 streams, each cancelled within 30 ms (Triton's count of them is told, not judged)."""

    def call(wait: float) -> str:
        with connected(stand.doors["grpc-stream"]) as connection:
            turn = Ask(uuid.uuid4().hex, True, text="Hi", sampling=LONG_ANSWER)
            pieces = connection.stream(turn)
            leaving = threading.Timer(wait, connection.cancel)
            leaving.start()
            with suppress(Exception):
                for _ in pieces:
                    pass
            leaving.join()
        return "OK"

    def play() -> Counter[str]:
        answered: Counter[str] = Counter()
        for first in range(0, STREAMS, 10):
            calls = [partial(call, 0.03 * (first + each) / STREAMS) for each in range(10)]
            answered += side_by_side(calls)
        time.sleep(3.0)
        stand.stop()
        told = re.findall(r"has (\d+) in-flight inferences", stand.log.read_text(errors="replace"))
        stand.start()
        answered[f"{sum(map(int, told))} in flight for ever by Triton's count"] += 1
        return answered

    return play
