"""`llava-triton chat` and `ask`: in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from llava_cli.conversation import Chat
from llava_cli.errors import CommandError
from llava_cli.open_chat import open_chat
from llava_triton.client import SessionError

HELP = """\
/picture FILE  show a picture with the next question
/again         another answer to the last question
/back          take the last turn back
/new           a new chat
/quit          end (or Ctrl-D); Ctrl-C stops an answer"""


def ask_once(url: str, text: str, pictures: Sequence[Path]) -> None:
    """Print one answer as it comes, and its cost to standard error.

    Raises:
        SessionError: the turn was refused, or nobody answers.
        CommandError: a picture cannot be read.
    """
    with closing(open_chat(url)) as chat:
        for piece in chat.ask(text, [read_picture(picture) for picture in pictures]):
            print(piece, end="", flush=True)
        print()
        print(chat.turns[-1].cost, file=sys.stderr)


def talk(url: str, pictures: Sequence[Path]) -> None:
    """Chat until the input ends.

    Raises:
        CommandError: a picture cannot be read.
    """
    Terminal(url, [read_picture(picture) for picture in pictures]).run()


class Terminal:
    """One chat after the other.

    Args:
        url: see `open_chat`.
        pictures: shown with the first question.
    """

    def __init__(self, url: str, pictures: list[bytes]) -> None:
        self._url = url
        self._chat: Chat = open_chat(url)
        self._pictures = pictures
        self._console = Console(highlight=False)

    def run(self) -> None:
        """Read lines and answer them until the input ends."""
        self._console.print(f"[dim]{escape(self._url)}; /help lists what else there is[/]")
        try:
            while True:
                number = len(self._pictures)
                mark = f" [dim]({number} picture{'s' * (number > 1)})[/]" if number else ""
                line = self._console.input(f"[bold cyan]You[/]{mark} ").strip()
                if line == "/quit":
                    return
                if line:
                    self._take(line)
        except (EOFError, KeyboardInterrupt):
            self._console.print()
        finally:
            self._chat.close()

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        try:
            if word == "/picture":
                self._pictures.append(read_picture(Path(rest.strip()).expanduser()))
            elif word == "/again" and self._chat.turns:
                self._answer(self._chat.again())
            elif word == "/back" and self._chat.turns:
                self._chat.rewind(len(self._chat.turns) - 1)
            elif word == "/new":
                self._chat.close()
                self._chat, self._pictures = open_chat(self._url), []
            elif word.startswith("/"):
                self._console.print(HELP, markup=False)
            else:
                self._ask(line)
        except (SessionError, CommandError) as error:
            sentence = error.sentence if isinstance(error, SessionError) else str(error)
            self._console.print(f"[red]{escape(sentence)}[/]")

    def _ask(self, text: str) -> None:
        """Show the pictures with a question; they stay for the next one if it makes no turn."""
        turns = len(self._chat.turns)
        try:
            self._answer(self._chat.ask(text, self._pictures))
        finally:
            if len(self._chat.turns) > turns:
                self._pictures = []

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        stopped = False
        self._console.print("[bold green]LLaVA[/] ", end="")
        try:
            for piece in pieces:
                self._console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            stopped = True
            self._console.print(" [dim](stopped)[/]", end="")
        finally:
            pieces.close()
            self._console.print()
        cost = self._chat.turns[-1].cost if not stopped else None
        if cost is not None:
            self._console.print(f"[dim]{cost}[/]")


def read_picture(path: str | Path) -> bytes:
    """A picture's file.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"the picture {path} cannot be read: {error.strerror}") from error
