"""Which instance a request goes to: sessions stick to theirs."""

from __future__ import annotations

import time
from calendar import timegm
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_sagemaker.local.aws_wire import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llava_sagemaker.local.instances import LocalInstance


@dataclass(frozen=True)
class _Stuck:
    instance: LocalInstance
    generation: int
    """Of the instance: one that was started again has forgotten its sessions."""
    expires: float
    """Seconds since the epoch."""

    @property
    def is_there(self) -> bool:
        """Whether the instance may still know the session, be its pings answered or not."""
        lives = self.instance.generation == self.generation and not self.instance.has_ended()
        return lives and time.time() < self.expires


class StickyRouting:
    """Learns from the containers' answers which session is where.

    Args:
        instances: all of them.
    """

    def __init__(self, instances: Sequence[LocalInstance]) -> None:
        self._instances = instances
        self._sessions: dict[str, _Stuck] = {}
        self._outstanding = dict.fromkeys(instances, 0)

    @contextmanager
    def instance_for(self, session_id: str | None) -> Iterator[LocalInstance]:
        """The instance of a session; for an unknown one, a new one or none, the healthy instance
        with the fewest outstanding requests, of several the one with the fewest sessions.

        Raises:
            ServiceError: no instance is in service.
        """
        instance = self._find(session_id)
        self._outstanding[instance] += 1
        try:
            yield instance
        finally:
            self._outstanding[instance] -= 1

    def opened(self, header: str, instance: LocalInstance) -> None:
        """A container's header tells of a new session: `<id>; Expires=<time>`."""
        session_id, _, expires = header.partition("; Expires=")
        until = timegm(time.strptime(expires, "%Y-%m-%dT%H:%M:%SZ"))
        now = time.time()
        self._sessions = {each: at for each, at in self._sessions.items() if now < at.expires}
        self._sessions[session_id] = _Stuck(instance, instance.generation, until)

    def closed(self, session_id: str) -> None:
        """A container's header tells that a session is over."""
        self._sessions.pop(session_id, None)

    def _find(self, session_id: str | None) -> LocalInstance:
        stuck = self._sessions.get(session_id) if session_id else None
        if stuck is not None and stuck.is_there:
            return stuck.instance
        healthy = [instance for instance in self._instances if instance.in_service]
        if not healthy:
            raise ServiceError(503, "ServiceUnavailable", "no instance of the endpoint is ready")
        held = Counter(each.instance for each in self._sessions.values() if each.is_there)
        chosen = min(healthy, key=lambda each: (self._outstanding[each], held[each]))
        if session_id and stuck is not None and time.time() < stuck.expires:
            # Its instance has gone: all its requests go to the same other one.
            self._sessions[session_id] = _Stuck(chosen, chosen.generation, stuck.expires)
        return chosen
