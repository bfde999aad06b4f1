"""What a peer's own process does: it reads a script, holds the sessions, writes the loads.

Nothing here, and nothing that a peer's file imports, needs more than numpy and the peer itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import Ask, Way, hold_all, write_loads
from benchmarks.script import Script, turn_text


class Conversation:
    """One session's token IDs, as a client keeps them that must send all of them every time.

    Args:
        tokenizer: `tokenizers.Tokenizer` of the checkpoint.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        """The picture is one placeholder."""

    def add_question(self, ask: Ask) -> list[int]:
        """Everything said up to the question, which is the prompt of its turn."""
        text = turn_text(str(ask.text), start=ask.start)
        self.ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return list(self.ids)

    def add_answer(self, ids: Sequence[int]) -> str:
        """What they say."""
        self.ids += ids
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.removeprefix(" ")


def play(description: str | None, way_of: Callable[[Script, Path], Way]) -> int:
    """The command of a peer's file.

    Args:
        description: of the command.
        way_of: makes the peer for a script and the folder of what was prepared for it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--script", type=Path, required=True, help="what `Script.write` wrote")
    parser.add_argument("--sessions", type=int, nargs="+", required=True, help="ascending")
    parser.add_argument("--output", type=Path, required=True, help="where to write the loads")
    parser.add_argument("--prepared", type=Path, required=True, help="what was exported before")
    options = parser.parse_args()
    script = Script.read(options.script)
    way = way_of(script, options.prepared)
    write_loads(options.output, hold_all(way, script, options.sessions))
    way.close()
    return 0
