"""How long steps take, learned from those that were done."""

from __future__ import annotations

STALL = 1.5
"""A step that also computes prompts is planned to take this many times as long as one that only
advances running answers. None should take three times as long; estimates are somewhat wrong, and
machines stumble."""
LEAST_CHUNK = 4
"""Prompt tokens of such a step at the least, so that every prompt goes on."""
STEPS_UNTIL_A_LOOK = 16
"""After so many of them one step advances running answers alone: they get slower as they grow, and
in other steps that would look like the prompt's doing."""
SMOOTHING = 0.3
"""Weight of the newest measurement."""


class StepClock:
    """Chooses how many prompt tokens go beside running answers.

    A step is taken for the time of its running answers plus a time per prompt token.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._seconds_per_prompt_token: float | None = None
        self._planned_since_a_look = 0

    @property
    def decode_seconds(self) -> float:
        """What a step takes that only advances running answers; 0 where none was seen yet."""
        return self._decode_seconds or 0.0

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many running answers and prompt tokens took so long."""
        if not prompt_tokens:
            self._decode_seconds = _smoothed(self._decode_seconds, seconds)
            self._planned_since_a_look = 0
            return
        rest = seconds - (self.decode_seconds if decoding else 0.0)
        per_token = max(rest, 0.1 * seconds) / prompt_tokens
        self._seconds_per_prompt_token = _smoothed(self._seconds_per_prompt_token, per_token)

    def plan(self, decoding: int, most: int) -> int:
        """How many prompt tokens the next step may compute beside so many running answers; 0 now
        and then.

        Args:
            decoding: running answers that the step advances.
            most: prompt tokens of a step at the most.
        """
        decode, per_token = self._decode_seconds, self._seconds_per_prompt_token
        if not decoding or decode is None or per_token is None:
            return most
        if self._planned_since_a_look == STEPS_UNTIL_A_LOOK:
            self._planned_since_a_look = 0
            return 0
        self._planned_since_a_look += 1
        return min(most, max(LEAST_CHUNK, int((STALL - 1.0) * decode / per_token)))


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else (1.0 - SMOOTHING) * before + SMOOTHING * now
