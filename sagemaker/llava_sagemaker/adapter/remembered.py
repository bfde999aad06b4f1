"""What chat completions have said in their sessions: enough to see that a request continues it.

It may be forgotten at any time: the conversation is sent to the session again then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from llava_sagemaker.adapter.chat_messages import NOTHING_SAID, Conversation, extended
from llava_sagemaker.adapter.turns import Turn
from llava_triton import protocol


@dataclass(eq=False)
class _Known:
    """Of one session; a new object with every turn, so that an overtaken turn changes nothing."""

    digest: bytes | None = None
    """Of what was said; None while a turn runs, or where it is not known."""
    shown_elsewhere: bool = False
    """It has pictures that no chat completion showed."""


class Remembered:
    """Digests of conversations by session ID, of the sessions used last.

    Args:
        limit: sessions to remember.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def conversation(self, session_id: str) -> bytes | None:
        """The digest of what was said in a session; None where that is not known."""
        known = self._known.get(session_id)
        return known.digest if known else None

    def shown_elsewhere(self, session_id: str) -> bool:
        """Whether a session has pictures that no chat completion showed."""
        known = self._known.get(session_id)
        return known is not None and known.shown_elsewhere

    def other_turn_begins(self, turn: Turn) -> Callable[[], None]:
        """A session gets a turn that is no chat completion.

        Returns:
            What to call when it is complete.
        """
        if turn.end:
            self._known.pop(turn.session_id, None)
            return lambda: None
        shown = protocol.IMAGE in turn.tensors
        if not turn.start:
            shown = shown or self.shown_elsewhere(turn.session_id)
        known = self._put(turn.session_id, _Known(shown_elsewhere=shown), turn.start)

        def completed() -> None:
            silent = turn.tensors.keys() <= {protocol.IMAGE, protocol.SAMPLING_PARAMETERS}
            if turn.start and silent:
                known.digest = NOTHING_SAID

        return completed

    def turn_begins(
        self, session_id: str, before: bytes | None, asked: Conversation, opens: bool
    ) -> Callable[[str], None]:
        """A session is asked.

        Args:
            session_id: whose.
            opens: whether it opens with that.
            before: the digest of what was said in it before; None where that is not known.
            asked: the question and its pictures.

        Returns:
            What to call with the whole answer. Until then, and for ever if the turn fails or
            another one comes meanwhile, the session's conversation is not known.
        """
        shown = self.shown_elsewhere(session_id)
        known = self._put(session_id, _Known(shown_elsewhere=shown), opens)

        def completed(answer: str) -> None:
            # After another turn has begun this object is nobody's: it does no harm.
            if before is not None:
                known.digest = extended(before, asked.text, asked.images, answer)

        return completed

    def _put(self, session_id: str, known: _Known, opens: bool) -> _Known:
        if not opens and session_id not in self._known:
            # Forgotten, or an ID that somebody made up: those must not push out the others.
            return known
        self._known[session_id] = known
        self._known.move_to_end(session_id)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return known
