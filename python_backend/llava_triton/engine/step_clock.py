"""How long steps take, learned from those that were done."""

from __future__ import annotations

import statistics
from collections import deque

STEPS_UNTIL_A_LOOK = 16
"""Every 17th mixed step runs decode only, to measure decode time again: running answers get slower
as they grow."""
LOOK_GROWTH = 2.0
"""The same where there are so many times more running answers than at the last such step, or
fewer."""


class StepClock:
    """Learns what steps take, and says how many prompt tokens fit into so much time.

    Two shapes are common. On a CPU every prompt token costs the same beside the running answers. On
    a GPU a step of few tokens takes the time of reading the weights, however many they are, and
    from some number on the arithmetic's. Of both it is true that a step takes at most the time of
    its answers alone and that of its prompt tokens alone together, and that no token costs more
    where there are more of them. Only this is assumed.

    A slow step tells of the machine and not of the work: decode time is the lower of the last two,
    other figures are medians of the last three.
    """

    def __init__(self) -> None:
        self._decode: deque[float] = deque(maxlen=2)
        """Seconds of the latest steps of running answers alone, of about as many as now."""
        self._decoded = 0
        """How many the latest of them had."""
        self._looked_at = 0
        """The same, of the one that is planned too."""
        self._mixed_since = 0
        """Mixed steps planned since."""
        self._mixed: deque[tuple[int, float]] = deque(maxlen=3)
        """Prompt tokens and seconds of the latest steps with prompts beside answers."""
        self._alone: dict[int, deque[float]] = {}
        """Seconds a token of the latest steps of prompts alone, by the bits of how many tokens they
        had."""

    @property
    def decode_seconds(self) -> float:
        """What a step takes that only advances running answers; 0 where none was seen yet."""
        return min(self._decode, default=0.0)

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many running answers and prompt tokens took so long."""
        if not prompt_tokens:
            if self._differs(decoding, self._decoded):
                self._decode.clear()
            self._decode.append(seconds)
            self._decoded = self._looked_at = decoding
            self._mixed_since = 0
        elif decoding:
            self._mixed.append((prompt_tokens, seconds))
        else:
            bits = prompt_tokens.bit_length()
            self._alone.setdefault(bits, deque(maxlen=3)).append(seconds / prompt_tokens)

    def takes_look(self, decoding: int, *, hurry: bool = False) -> bool:
        """Whether the next step is to advance so many running answers and nothing else, so that it
        is known how long that takes; the step is planned then.

        Args:
            decoding: running answers.
            hurry: a short prompt would wait for it, so only every 17th mixed step is one.
        """
        self._mixed_since += 1
        if (
            self._decode
            and self._mixed_since <= STEPS_UNTIL_A_LOOK
            and (hurry or not self._differs(decoding, self._looked_at))
        ):
            return False
        self._looked_at, self._mixed_since = decoding, 0
        return True

    @staticmethod
    def _differs(decoding: int, before: int) -> bool:
        few, many = sorted((decoding, before))
        return many > LOOK_GROWTH * few

    def tokens_alone(self, seconds: float) -> int:
        """How many prompt tokens are computed in about so long where nothing is beside them; 0
        where no prompt was seen yet."""
        if seconds <= 0.0 or not self._alone:
            return 0
        # The lowest is of the largest steps, which is what one more token costs.
        return int(seconds / min(statistics.median_low(took) for took in self._alone.values()))

    def alone_seconds(self, tokens: int) -> float:
        """How long so many prompt tokens take where nothing is beside them; 0 where no prompt was
        seen yet."""
        if not self._alone:
            return 0.0
        seen = self._alone.get(tokens.bit_length())
        rates = [seen] if seen else self._alone.values()
        return tokens * min(statistics.median_low(took) for took in rates)

    def tokens_beside(self, seconds: float) -> int:
        """How many prompt tokens a step of `seconds` has room for beside the running answers."""
        spare = seconds - self.decode_seconds
        if spare <= 0.0:
            return 0
        unseen = self.tokens_alone(spare)
        if not self._mixed:
            return unseen
        return statistics.median_low(
            self._scaled(tokens, took, seconds, unseen) for tokens, took in self._mixed
        )

    def _scaled(self, tokens: int, took: float, seconds: float, unseen: int) -> int:
        """How many tokens fit into `seconds`, where `tokens` took so long."""
        spare, used = seconds - self.decode_seconds, took - self.decode_seconds
        by_token = tokens * spare / used if used > 0.0 else float("inf")
        if took >= seconds:
            return int(by_token)
        # Larger than seen: at most what the cheaper of two sure ways allows. All of a step grows
        # with its tokens, or every token costs what it costs alone.
        return int(min(by_token, max(tokens * seconds / took, unseen)))
