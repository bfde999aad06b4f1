"""What Triton's metrics port tells about sessions, in Prometheus' terms.

Histograms are published as the counters they consist of (`_bucket` with `le`, `_sum`, `_count`):
one message to Triton per observation would cost more than the observed tokens, and Prometheus
computes quantiles from the series by their names.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llava_triton.engine.statistics import Histogram, Statistics
from llava_triton.pictures.encoding import PictureEncoding

if TYPE_CHECKING:
    from llava_triton.journal.writer import JournalCounters
    from llava_triton.serving.picture_journal import PictureJournal

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.5
"""How old the numbers on the metrics port can be."""


@dataclass(frozen=True)
class Sample:
    """One number of a metric."""

    name: str
    help: str
    counter: bool
    """It only grows; otherwise a gauge."""
    value: float
    labels: dict[str, str] = field(default_factory=dict)


def engine_metrics(now: Statistics) -> Iterator[Sample]:
    """Everything that `language_model` publishes."""
    for state, sessions in (("active", now.sessions_active), ("idle", now.sessions_idle)):
        yield _gauge("llava_sessions", "Open sessions", sessions, state=state)
    yield _counter("llava_sessions_opened_total", "Sessions opened", now.sessions_opened)
    yield _counter("llava_sessions_closed_total", "Sessions closed", now.sessions_closed)
    yield _counter("llava_sessions_expired_total", "Sessions expired", now.sessions_expired)
    yield _gauge("llava_turns_in_flight", "Turns that run or wait", now.turns_in_flight)
    for outcome, turns in (
        ("completed", now.turns_completed),
        ("cancelled", now.turns_cancelled),
        ("failed", now.turns_failed),
        ("refused", now.turns_refused),
    ):
        yield _counter("llava_turns_total", "Turns by outcome", turns, outcome=outcome)
    for source, tokens in (
        ("computed", now.prompt_tokens_computed),
        ("reused", now.prompt_tokens_reused),
    ):
        yield _counter("llava_prompt_tokens_total", "Prompt tokens", tokens, source=source)
    yield _counter("llava_generation_tokens_total", "Tokens generated", now.answer_tokens)
    for state, blocks in (("free", now.blocks_free), ("used", now.blocks_used)):
        yield _gauge("llava_kv_blocks", "Blocks of keys and values", blocks, state=state)
    yield _gauge("llava_kv_blocks_shared", "Blocks of several sessions", now.blocks_shared)
    yield _counter(
        "llava_prefix_cache_hit_blocks_total",
        "Blocks found computed by other sessions",
        now.prefix_cache_blocks,
    )
    yield _counter(
        "llava_kv_blocks_copied_total", "Shared blocks copied before a write", now.blocks_copied
    )
    yield _gauge("llava_kv_host_bytes", "Keys and values in host memory", now.host_bytes)
    for tier, count in (
        ("host", now.evicted_to_host),
        ("dropped", now.evicted_by_dropping),
    ):
        yield _counter("llava_kv_evictions_total", "Sessions that left", count, tier=tier)
    for tier, count in (
        ("host", now.restored_from_host),
        ("dropped", now.restored_by_computing),
    ):
        yield _counter("llava_kv_restores_total", "Sessions that came back", count, tier=tier)
    yield _gauge("llava_images", "Different pictures of the open sessions", now.images)
    yield _counter("llava_image_evictions_total", "Pictures sent to host", now.images_evicted)
    yield _counter("llava_image_features_hits_total", "Pictures shared", now.image_hits)
    if now.journal is not None:
        yield from _journal_metrics(now.journal)
    yield from _histogram(
        "llava_time_to_first_token_seconds",
        "From a turn's arrival in the engine to its first token",
        now.first_token_seconds,
    )
    yield from _histogram(
        "llava_time_between_tokens_seconds",
        "From one token of an answer to the next",
        now.between_tokens_seconds,
    )


def _journal_metrics(now: JournalCounters) -> Iterator[Sample]:
    for outcome, records in (
        ("written", now.written),
        ("dropped", now.dropped),
        ("elsewhere", now.elsewhere),
    ):
        yield _counter("llava_journal_records_total", "Turns by outcome", records, outcome=outcome)
    yield _gauge("llava_journal_records_waiting", "Turns not written yet", now.waiting)
    yield _counter("llava_journal_retries_total", "Calls of the store done again", now.retries)
    yield _counter("llava_sessions_resumed_total", "Sessions brought back", now.resumed)
    yield _counter(
        "llava_sessions_hibernated_total", "Sessions that left the memory", now.hibernated
    )


def image_encoder_metrics(
    pictures: PictureEncoding, journal: PictureJournal | None = None
) -> Iterator[Sample]:
    """Everything that `image_encoder` publishes."""
    for result, count in (("hit", pictures.hits), ("miss", pictures.misses)):
        yield _counter("llava_image_cache_total", "Pictures to encode", count, result=result)
    if journal is not None:
        for outcome, count in (("written", journal.written), ("dropped", journal.dropped)):
            yield _counter(
                "llava_journal_pictures_total", "Pictures by outcome", count, outcome=outcome
            )


def _gauge(name: str, text: str, value: float, **labels: str) -> Sample:
    return Sample(name, text, False, value, labels)


def _counter(name: str, text: str, value: float, **labels: str) -> Sample:
    return Sample(name, text, True, value, labels)


def _histogram(name: str, text: str, histogram: Histogram) -> Iterator[Sample]:
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
        yield _counter(f"{name}_bucket", text, count, le=bound)
    yield _counter(f"{name}_sum", text, histogram.sum)
    yield _counter(f"{name}_count", text, sum(histogram.counts))


class Publisher:
    """Copies samples to Triton's metrics every `PUBLISH_SECONDS`, on a thread of its own.

    Args:
        pb_utils: `triton_python_backend_utils`.
        samples: the numbers as they are now; always the same metrics with the same labels.
    """

    def __init__(self, pb_utils: Any, samples: Callable[[], Iterator[Sample]]) -> None:
        self._pb_utils = pb_utils
        self._samples = samples
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._published: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish no more."""
        self._stopping.set()
        self._thread.join()
        self._metrics.clear()  # before their families: Triton insists
        self._families.clear()

    def _run(self) -> None:
        while True:
            try:
                for sample in self._samples():
                    self._publish(sample)
            except Exception:  # numbers are not worth a server
                log.exception("metrics could not be published")
            if self._stopping.wait(PUBLISH_SECONDS):
                return

    def _publish(self, sample: Sample) -> None:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        before = self._published.get(key)
        if before is None:
            self._metrics[key] = self._family(sample).Metric(labels=sample.labels)
            before = 0.0
        if sample.value != before:
            metric = self._metrics[key]
            if sample.counter:
                metric.increment(sample.value - before)
            else:
                metric.set(sample.value)
        self._published[key] = sample.value

    def _family(self, sample: Sample) -> Any:
        if sample.name not in self._families:
            kind = self._pb_utils.MetricFamily
            self._families[sample.name] = kind(
                name=sample.name,
                description=sample.help,
                kind=kind.COUNTER if sample.counter else kind.GAUGE,
            )
        return self._families[sample.name]
