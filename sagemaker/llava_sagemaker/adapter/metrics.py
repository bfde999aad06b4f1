"""The adapter's own numbers, for Prometheus."""

from __future__ import annotations

from collections import Counter


class AdapterMetrics:
    """Counts requests. Of the event loop's thread only."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: Counter[tuple[str, str]] = Counter()

    def ended(self, kind: str, outcome: str) -> None:
        """A request has ended.

        Args:
            kind: what it was: chat, text, triton, sample, open, image, close; unknown where that
                could not be told.
            outcome: ok, disconnected, or the error's code.
        """
        self._requests[kind, outcome] += 1

    def text(self) -> str:
        """In Prometheus's format."""
        lines = [
            "# HELP llava_adapter_requests_in_flight Requests to the model under way",
            "# TYPE llava_adapter_requests_in_flight gauge",
            f"llava_adapter_requests_in_flight {self.in_flight}",
            "# HELP llava_adapter_requests_total Requests to the model by kind and outcome",
            "# TYPE llava_adapter_requests_total counter",
        ]
        lines += [
            f'llava_adapter_requests_total{{kind="{kind}",outcome="{outcome}"}} {count}'
            for (kind, outcome), count in sorted(self._requests.items())
        ]
        return "\n".join(lines) + "\n"
