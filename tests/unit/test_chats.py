"""Chats as a person holds them, over servers that refuse, break off or are not waited for."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_cli import bench, terminal
from llava_cli.conversation import Chat, ChatTurn
from llava_cli.errors import CommandError
from llava_cli.open_chat import open_chat
from llava_cli.openai_chat import OpenAIChat
from llava_cli.terminal import Terminal
from llava_triton.client import ErrorCode, SessionError
from llava_triton.client.opening import Address


class Scripted(Chat):
    """Every turn takes the next of `script`: an answer, or what is raised instead of one."""

    def __init__(self, *script: str | BaseException) -> None:
        super().__init__()
        self.script = list(script)
        self.sent: list[int] = []
        """Pictures of each turn."""
        self.forgotten = 0

    def _pieces(self, turn: ChatTurn, sampling: dict[str, Any]) -> Generator[str, None, None]:
        self.sent.append(len(turn.pictures))
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        yield step

    def _forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None:
        pass


REFUSED = SessionError(ErrorCode.UNAVAILABLE, "the server is full")


@pytest.mark.parametrize("failure", [REFUSED, KeyboardInterrupt()])
def test_pictures_stay_until_their_question_is_a_turn(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Scripted("yes", failure, "one", "none")
    monkeypatch.setattr(terminal, "open_chat", lambda url: chat)
    lines = iter(["Hello?", "/picture here.png", "How many?", "How many?", "And now?", "/quit"])
    monkeypatch.setattr(terminal, "read_picture", lambda path: b"a picture")
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))
    Terminal("grpc://nowhere:1", []).run()
    assert chat.sent == [0, 1, 1, 0]
    assert [len(turn.pictures) for turn in chat.turns] == [0, 1, 0]


@pytest.mark.parametrize("failure", [REFUSED, KeyboardInterrupt()])
def test_another_answer_that_does_not_come_leaves_the_one_there_was(failure: BaseException) -> None:
    chat = Scripted("one", failure)
    list(chat.ask("How many?"))
    with pytest.raises(type(failure)):
        list(chat.again())
    assert [turn.answer for turn in chat.turns] == ["one"]


def test_an_answer_that_nobody_waits_for_is_forgotten_at_the_server() -> None:
    chat = Scripted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("How many?"))
    assert (chat.forgotten, chat.turns) == (1, [])


PIECE = b'data: {"choices": [{"delta": {"content": "one"}, "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'


@contextmanager
def answering(body: bytes, headers: dict[str, str]) -> Iterator[str]:
    """The URL of a server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("end", [LAST, b"data: [DONE]\n\n"])
def test_an_answer_ends_with_a_finish_reason_or_done(end: bytes) -> None:
    with answering(PIECE + end, {}) as url:
        chat = OpenAIChat(url)
        assert "".join(chat.ask("How many?")) == "one"
    assert [turn.answer for turn in chat.turns] == ["one"]


CHUNKED = {"Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    ("body", "headers", "says"),
    [
        (PIECE, {}, "has broken off"),
        (b"", {}, "has broken off"),
        (b"%x\r\n%b\r\n40\r\ndata" % (len(PIECE), PIECE), CHUNKED, "IncompleteRead"),
        (b"data: []\n\n", {}, "AttributeError"),
        (b'data: {"choices": [{"delta": null}]}\n\n', {}, "AttributeError"),
    ],
)
def test_an_answer_that_breaks_off_is_no_turn(
    body: bytes, headers: dict[str, str], says: str
) -> None:
    with answering(body, headers) as url:
        chat = OpenAIChat(url)
        with pytest.raises(SessionError, match=says) as caught:
            list(chat.ask("How many?"))
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert chat.turns == []


@pytest.mark.parametrize("url", ["http://a host/v1", "http://host:port/v1"])
def test_an_address_that_no_request_can_go_to(url: str) -> None:
    with pytest.raises(SessionError, match="no chat completions at"):
        list(OpenAIChat(url).ask("?"))


@pytest.mark.parametrize("url", ["grpc://[::1", "http://[x/v1", "localhost"])
def test_a_url_that_is_none_is_told_at_once(url: str) -> None:
    for read in (open_chat, Address.of):
        with pytest.raises(SessionError, match=r"^INVALID_ARG: the URL is"):
            read(url)


def _png() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    return encoded.getvalue()


def _bomb() -> bytes:
    """A PNG that says it is of 60,000 by 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return _png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + _png()[33:]


@pytest.mark.parametrize(
    "file", [b"- no picture -", _png()[:33] + b"\0\0\0\x0cXXXX", _png()[:45], _bomb()]
)
def test_bench_wants_a_picture(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(file)
    with pytest.raises(CommandError, match=r"picture\.png is no picture that can be read"):
        bench.run("grpc://nowhere:1", path, sessions=1, turns=1, tokens=1)
