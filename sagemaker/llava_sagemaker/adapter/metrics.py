"""What /metrics tells: the adapter's own numbers, and each engine's with the engine's number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llava_sagemaker.adapter.engines import Engines


class AdapterMetrics:
    """Counts requests. Of the event loop's thread only.

    Args:
        engines: what it tells of, too.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
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
        lines += [
            "# HELP llava_adapter_engine_up Whether the adapter is connected to the engine",
            "# TYPE llava_adapter_engine_up gauge",
        ]
        lines += [
            f'llava_adapter_engine_up{{engine="{each.number}"}} {int(each.serves)}'
            for each in self._engines.all
        ]
        lines += [
            "# HELP llava_adapter_turns_resumed_total Turns sent again, for the journal to bring "
            "their session back",
            "# TYPE llava_adapter_turns_resumed_total counter",
            f"llava_adapter_turns_resumed_total {self._engines.resumed}",
        ]
        return "\n".join(lines) + "\n"


_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>[^}]+)")


def joined(pages: Sequence[str]) -> str:
    """Metrics of several engines as one page, every number with its engine's number.

    Args:
        pages: Prometheus's text of each, by the engine's number; empty where there is none.
    """
    families: dict[str, list[str]] = {}
    """By the lines before their numbers: those of one family must follow one another."""
    for number, page in enumerate(pages):
        head: list[str] = []
        for line in page.splitlines():
            if line.startswith("#"):
                head = [line] if line.startswith("# HELP") else [*head, line]
                continue
            sample = _SAMPLE.fullmatch(line)
            if sample is not None:
                family = families.setdefault("\n".join(head), [])
                labels = f"{sample['labels']}," if sample["labels"] else ""
                family.append(f'{sample["name"]}{{{labels}engine="{number}"}} {sample["value"]}')
    return "".join(
        f"{head}\n" * bool(head) + "\n".join(family) + "\n" for head, family in families.items()
    )
