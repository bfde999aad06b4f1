"""How a whole answer gets from language_model's process to answer_collector's, which waits for it.

language_model streams, and an ensemble with a model that streams is itself one that streams: so
`llava`, which answers once, reaches it by a BLS call of answer_collector. That call hands the turn
over and ends at once, empty. When the turn has ended, language_model sends the answer through a
Unix socket that answer_collector listens at.

No tensor comes back from a decoupled BLS call, because freeing such tensors corrupts the process
that made the call (`benchmarks/decoupled_bls.py` shows it). And a turn that waits occupies neither
a thread here nor one of the 32 places that Triton's Python backend has for a model's calls. (The
answer by a BLS call of language_model costs a request of Triton's more: 4 to 5 % of all turns.)
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Connection, Listener

from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError

log = logging.getLogger(__name__)

Outcome = Delta | SessionError
"""A whole answer, or why there is none."""
_CREDENTIALS = struct.Struct("3i")
"""Of a socket's other end: process, user, group (unix(7), SO_PEERCRED)."""


class WholeAnswer:
    """A turn's listener that gathers the pieces and tells its outcome once.

    Args:
        tell: is called with the outcome, on the engine's thread.
    """

    def __init__(self, tell: Callable[[Outcome], None]) -> None:
        self._tell = tell
        self._pieces: list[Delta] = []

    def __call__(self, event: Delta | SessionError) -> None:
        """Take the turn's next event."""
        if isinstance(event, SessionError):
            self._tell(event)
            return
        self._pieces.append(event)
        if event.is_final:
            self._tell(ANSWER.joined(self._pieces))


class Inbox:
    """answer_collector's end: where answers arrive.

    Args:
        deliver: is called with the number under which an answer is waited for and the answer, on a
            thread of the inbox.
    """

    def __init__(self, deliver: Callable[[str, Outcome], None]) -> None:
        self._deliver = deliver
        self._name = uuid.uuid4().hex
        self._closing = False
        self._listener = Listener(_address(self._name), "AF_UNIX")
        self._accepting = threading.Thread(target=self._accept, name="answers", daemon=True)
        self._accepting.start()

    def token(self, number: str) -> str:
        """What a turn is handed over with, so that its answer comes here under this number."""
        return f"{self._name}/{number}"

    def close(self) -> None:
        """No new sender is heard."""
        self._closing = True
        Client(_address(self._name), "AF_UNIX").close()  # else the thread would wait on
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            sender = self._listener.accept()
            if self._closing or not _is_ours(sender):
                sender.close()
            else:
                threading.Thread(target=self._receive, args=(sender,), daemon=True).start()
            if self._closing:
                return

    def _receive(self, sender: Connection) -> None:
        while True:
            try:
                number, outcome = _decoded(sender.recv_bytes())
            except (EOFError, OSError):  # language_model has ended
                return
            self._deliver(number, outcome)


class Outbox:
    """language_model's end: sends answers, in order, beside the engine's thread."""

    def __init__(self) -> None:
        self._inboxes: dict[str, Connection] = {}
        """By name; in life there is one."""
        self._thread = ThreadPoolExecutor(1, "deliveries")

    def send(self, token: str, outcome: Outcome) -> None:
        """Send an outcome to who waits for it under `token`. Returns at once; a failure is logged,
        as when a client, not answer_collector, has made the token up."""
        self._thread.submit(self._send, token, outcome)

    def close(self) -> None:
        """Send what is left."""
        self._thread.shutdown()
        for inbox in self._inboxes.values():
            inbox.close()

    def _send(self, token: str, outcome: Outcome) -> None:
        name, _, number = token.rpartition("/")
        try:
            inbox = self._inboxes.get(name)
            if inbox is None:
                inbox = Client(_address(name), "AF_UNIX")
                if not _is_ours(inbox):
                    inbox.close()
                    raise PermissionError("another user listens there")
                self._inboxes[name] = inbox
            inbox.send_bytes(_encoded(number, outcome))
        except Exception as error:
            self._inboxes.pop(name, None)
            log.warning("an answer was not delivered: %r", error)


def _address(name: str) -> str:
    """No file: a name in the kernel's abstract namespace, which goes with its process."""
    return f"\0llava-triton-answers-{name}"


def _is_ours(connection: Connection) -> bool:
    """Whether the other end is of our own user: the names of such sockets are no secrets."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())


def _encoded(number: str, outcome: Outcome) -> bytes:
    if isinstance(outcome, SessionError):
        told = {"code": outcome.code.name, "sentence": outcome.sentence, "subject": outcome.subject}
    else:
        told = ANSWER.to_values(outcome)
    return json.dumps([number, told]).encode()


def _decoded(message: bytes) -> tuple[str, Outcome]:
    number, told = json.loads(message)
    if "code" in told:
        return number, SessionError(ErrorCode[told["code"]], told["sentence"], told["subject"])
    return number, ANSWER.from_values(told)
