"""What happens while many clients run, counted by all of them."""

from __future__ import annotations

import threading
from collections import Counter

KEPT_SENTENCES = 20


class Happenings:
    """What happened so far; the clients' threads share it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.sentences: list[str] = []
        """The first failures, for a person."""
        self._lock = threading.Lock()

    def count(self, what: str, sentence: str = "") -> None:
        """One more of these."""
        with self._lock:
            self.counts[what] += 1
            if sentence and len(self.sentences) < KEPT_SENTENCES:
                self.sentences.append(f"{what}: {sentence}")
                print(self.sentences[-1], flush=True)
