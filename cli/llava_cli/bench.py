"""`llava-triton bench`: how fast a running server answers so many sessions at a time."""

from __future__ import annotations

import asyncio
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llava_cli.errors import CommandError
from llava_triton.client import Answer, AsyncSession

QUESTION = "Describe the picture."


@dataclass
class Measured:
    """What all sessions saw."""

    openings: list[float] = field(default_factory=list)
    """Seconds until a session's picture was sent, encoded and prefilled."""
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    """From the first opening to the last answer."""


def run(url: str, picture: Path, sessions: int, turns: int, tokens: int) -> None:
    """Measure, and print a table.

    Args:
        url: as for `AsyncSession.open`.
        picture: every session shows it, changed a little, so that none is known to the server.
        sessions: how many, all at once.
        turns: questions in each.
        tokens: length of every answer.

    Raises:
        SessionError: the server refused something, or there is none.
        CommandError: the picture is none.
    """
    pictures = _different(picture, sessions)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{sessions} sessions", total=sessions * (turns + 1))
        measured = asyncio.run(
            _measure(url, pictures, turns, tokens, lambda: progress.advance(task))
        )
    console.print(_table(measured))


async def _measure(
    url: str, pictures: Sequence[bytes], turns: int, tokens: int, done: Callable[[], None]
) -> Measured:
    measured = Measured()

    async def talk(picture: bytes) -> None:
        began = time.perf_counter()
        async with await AsyncSession.open(url, image=picture) as session:
            measured.openings.append(time.perf_counter() - began)
            done()
            for _ in range(turns):
                measured.answers.append(await _answer(session, url, tokens))
                done()

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for picture in pictures:
                group.create_task(talk(picture))
    except ExceptionGroup as errors:  # the first one says what is wrong
        raise errors.exceptions[0] from None
    measured.seconds = time.perf_counter() - began
    return measured


async def _answer(session: AsyncSession, url: str, tokens: int) -> Answer:
    if url.startswith("http:"):  # Triton streams no sessions over HTTP
        return await session.ask(QUESTION, max_tokens=tokens, ignore_eos=True)
    stream = session.stream(QUESTION, max_tokens=tokens, ignore_eos=True)
    async for _ in stream:
        pass
    return stream.answer


def _different(path: Path, number: int) -> list[bytes]:
    """So many pictures that differ in their first pixel."""
    try:
        picture = Image.open(path).convert("RGB")
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise CommandError(f"{path} is no picture that can be read: {error}") from error
    encoded = []
    for index in range(number):
        picture.putpixel((0, 0), (index >> 16 & 255, index >> 8 & 255, index & 255))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def _table(measured: Measured) -> Table:
    answers = measured.answers
    between = [
        (answer.seconds - answer.first_token_seconds) / (answer.num_output_tokens - 1)
        for answer in answers
        if answer.num_output_tokens > 1
    ]
    rows = {
        "opening: picture sent, encoded, prefilled": measured.openings,
        "first token of a turn": [answer.first_token_seconds for answer in answers],
        "between two tokens": between,
    }
    table = Table("", "median", "95 %", box=None, padding=(0, 2, 0, 0))
    for name, values in rows.items():
        if values:
            table.add_row(name, _ms(statistics.median(values)), _ms(_high(values)))
    tokens = sum(answer.num_output_tokens for answer in answers)
    prompt = sum(answer.num_input_tokens for answer in answers)
    cached = sum(answer.num_cached_tokens for answer in answers)
    table.add_row("tokens per second, all sessions", f"{tokens / measured.seconds:.0f}")
    table.add_row("prompt tokens reused", f"{100 * cached / max(1, prompt):.0f} %")
    return table


def _high(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
