"""What the container tells CloudWatch, for autoscaling: open sessions and the memory they use."""

from __future__ import annotations

import logging
import os
import re
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llava_sagemaker.scaling_metrics import (
    ACTIVE_SESSIONS,
    ENDPOINT,
    GPU_MEMORY_USED,
    NAMESPACE,
    OPEN_SESSIONS,
)

log = logging.getLogger(__name__)

PERIOD_SECONDS = 60.0
_VALUE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy that the environment names: what it reads is on this machine."""


class MetricsToCloudWatch:
    """Sends numbers once a minute from a thread of its own. What fails is logged, no more.

    Args:
        metrics_urls: of the Prometheus metrics of each engine's Triton.
        endpoint: the SageMaker endpoint's name, the numbers' only dimension: an average over it is
            one over instances.
        cloudwatch: a boto3 client.
    """

    def __init__(self, metrics_urls: Sequence[str], endpoint: str, cloudwatch: Any) -> None:
        self._metrics_urls = metrics_urls
        self._endpoint = endpoint
        self._cloudwatch = cloudwatch
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cloudwatch", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, metrics_urls: Sequence[str]) -> MetricsToCloudWatch | None:
        """One for the endpoint that LLAVA_ENDPOINT_NAME names; None where there is none."""
        endpoint = os.environ.get("LLAVA_ENDPOINT_NAME")
        if not endpoint:
            return None
        import boto3  # only here: it takes half a second

        try:
            return cls(metrics_urls, endpoint, boto3.client("cloudwatch"))
        except Exception as error:
            log.warning("no metrics for CloudWatch: %s", error)
            return None

    def stop(self) -> None:
        """Send no more. Hardly waits: a request that hangs must not delay the container's end."""
        self._stopped.set()
        self._thread.join(timeout=0.5)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.send()
            except Exception as error:
                log.warning("CloudWatch has not got the metrics: %s", error)
            self._stopped.wait(PERIOD_SECONDS)

    def send(self) -> None:
        """Send the numbers as they are now.

        Raises:
            OSError: no engine tells them.
        """
        pages, failures = [], []
        for url in self._metrics_urls:
            try:
                with _DIRECT.open(url, timeout=5.0) as response:
                    pages.append(response.read().decode())
            except OSError as error:  # it is being started again, and has no sessions
                failures.append(error)
        if not pages:
            raise failures[0]
        numbers = numbers_of(pages)
        dimensions = [{"Name": ENDPOINT, "Value": self._endpoint}]
        self._cloudwatch.put_metric_data(
            Namespace=NAMESPACE,
            MetricData=[
                {"MetricName": name, "Dimensions": dimensions, "Value": value, "Unit": unit}
                for name, (value, unit) in numbers.items()
            ],
        )


def numbers_of(pages: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Prometheus text of each engine -> value and unit of every number for CloudWatch, of all
    engines together.

    GPU_MEMORY_USED is the part of the engines' caches that sessions use. What the driver calls used
    would tell nothing: an engine takes nearly all of it at its start.
    """
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for page in pages:
        for match in _VALUE.finditer(page):
            found[match["name"], match["labels"] or ""] += float(match["value"])
    active, idle = (found["llava_sessions", f'state="{state}"'] for state in ("active", "idle"))
    numbers = {OPEN_SESSIONS: (active + idle, "Count"), ACTIVE_SESSIONS: (active, "Count")}
    used, free = (found["llava_kv_blocks", f'state="{state}"'] for state in ("used", "free"))
    on_gpu = any(name == "nv_gpu_memory_total_bytes" for name, _ in found)
    if on_gpu and used + free > 0:
        numbers[GPU_MEMORY_USED] = (100.0 * used / (used + free), "Percent")
    return numbers
