"""What chat completions have said in their sessions: enough to see that a request continues it.

It may be forgotten at any time: the conversation is sent to the session again then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from llava_sagemaker.adapter.chat_messages import Conversation, extended


class Remembered:
    """Digests of conversations by session ID, of the sessions used last.

    Args:
        limit: sessions to remember.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: OrderedDict[str, bytes | object] = OrderedDict()
        """A digest; while a turn runs, a mark of that turn."""

    def conversation(self, session_id: str) -> bytes | None:
        """The digest of what was said in a session; None where that is not known."""
        known = self._known.get(session_id)
        return known if isinstance(known, bytes) else None

    def forget(self, session_id: str) -> None:
        """A session changes in a way that is not followed here."""
        self._known.pop(session_id, None)

    def turn_begins(
        self, session_id: str, before: bytes | None, asked: Conversation
    ) -> Callable[[str], None]:
        """A session is asked.

        Args:
            session_id: whose.
            before: the digest of what was said in it before; None where that is not known.
            asked: the question and its pictures.

        Returns:
            What to call with the whole answer. Until then, and for ever if the turn fails or
            another one comes meanwhile, the session's conversation is not known.
        """
        mark = object()
        self._known[session_id] = mark
        self._known.move_to_end(session_id)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)

        def completed(answer: str) -> None:
            if before is not None and self._known.get(session_id) is mark:
                self._known[session_id] = extended(before, asked.text, asked.images, answer)

        return completed
