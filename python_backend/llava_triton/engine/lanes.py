"""Turns in the order they came, session by session."""

from __future__ import annotations

from collections import deque

from llava_triton.engine.session import SessionId
from llava_triton.engine.turn import QueuedTurn


class Lanes:
    """A lane of turns for every session that has one; the first of a lane may be running."""

    def __init__(self) -> None:
        self._lanes: dict[SessionId, deque[QueuedTurn]] = {}
        self.turns = 0
        """In all lanes."""
        self.features_bytes = 0
        """Of the pictures that these turns bring and no session has yet."""

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._lanes

    def __len__(self) -> int:
        return len(self._lanes)

    def join(self, turn: QueuedTurn) -> None:
        """Put a turn behind those of its session."""
        self._lanes.setdefault(turn.request.session_id, deque()).append(turn)
        self.turns += 1
        self.features_bytes += turn.request.features_bytes

    def leave(self, turn: QueuedTurn) -> bool:
        """Take a turn out; returns whether there are others of its session."""
        session_id = turn.request.session_id
        lane = self._lanes[session_id]
        lane.remove(turn)
        self.turns -= 1
        self.features_bytes -= turn.request.features_bytes
        if not lane:
            del self._lanes[session_id]
        return bool(lane)

    def replace(self, turn: QueuedTurn, other: QueuedTurn) -> None:
        """Put another turn of the same session in a turn's place."""
        lane = self._lanes[turn.request.session_id]
        lane[lane.index(turn)] = other
        self.features_bytes += other.request.features_bytes - turn.request.features_bytes

    def forget_features(self, turn: QueuedTurn) -> None:
        """A turn's session has its pictures now."""
        self.features_bytes -= turn.request.features_bytes
        turn.forget_features()

    def head(self, session_id: SessionId) -> QueuedTurn | None:
        """The first turn of a session."""
        lane = self._lanes.get(session_id)
        return lane[0] if lane else None

    def of_session(self, session_id: SessionId) -> list[QueuedTurn]:
        """A session's turns, in order."""
        return list(self._lanes.get(session_id, ()))

    def all(self) -> list[QueuedTurn]:
        """Every turn."""
        return [turn for lane in self._lanes.values() for turn in lane]
