"""What the container tells CloudWatch, for autoscaling: open sessions, memory of the GPUs."""

from __future__ import annotations

import logging
import os
import re
import threading
import urllib.request
from typing import Any

log = logging.getLogger(__name__)

NAMESPACE = "LlavaTriton"
PERIOD_SECONDS = 60.0
_VALUE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)


class MetricsToCloudWatch:
    """Sends numbers once a minute from a thread of its own. What fails is logged, no more.

    Args:
        metrics_url: of Triton's Prometheus metrics.
        endpoint: the SageMaker endpoint's name, the numbers' only dimension: an average over it is
            one over instances.
        cloudwatch: a boto3 client.
    """

    def __init__(self, metrics_url: str, endpoint: str, cloudwatch: Any) -> None:
        self._metrics_url = metrics_url
        self._endpoint = endpoint
        self._cloudwatch = cloudwatch
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cloudwatch", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, metrics_url: str) -> MetricsToCloudWatch | None:
        """One for the endpoint that LLAVA_ENDPOINT_NAME names; None where there is none."""
        endpoint = os.environ.get("LLAVA_ENDPOINT_NAME")
        if not endpoint:
            return None
        import boto3  # only here: it takes half a second

        try:
            return cls(metrics_url, endpoint, boto3.client("cloudwatch"))
        except Exception as error:
            log.warning("no metrics for CloudWatch: %s", error)
            return None

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.send()
            except Exception as error:
                log.warning("CloudWatch has not got the metrics: %s", error)
            self._stopped.wait(PERIOD_SECONDS)

    def send(self) -> None:
        """Send the numbers as they are now."""
        with urllib.request.urlopen(self._metrics_url, timeout=5.0) as response:
            numbers = numbers_of(response.read().decode())
        dimensions = [{"Name": "EndpointName", "Value": self._endpoint}]
        self._cloudwatch.put_metric_data(
            Namespace=NAMESPACE,
            MetricData=[
                {"MetricName": name, "Dimensions": dimensions, "Value": value, "Unit": unit}
                for name, (value, unit) in numbers.items()
            ],
        )


def numbers_of(metrics: str) -> dict[str, tuple[float, str]]:
    """Prometheus text -> value and unit of every number for CloudWatch."""
    states: dict[str, float] = {}
    used = total = 0.0
    for found in _VALUE.finditer(metrics):
        name, labels, value = found["name"], found["labels"] or "", float(found["value"])
        if name == "llava_sessions":
            states[labels] = value
        elif name == "nv_gpu_memory_used_bytes":
            used += value
        elif name == "nv_gpu_memory_total_bytes":
            total += value
    numbers = {
        "OpenSessions": (sum(states.values()), "Count"),
        "ActiveSessions": (states.get('state="active"', 0.0), "Count"),
    }
    if total:
        numbers["GpuMemoryUsed"] = (100.0 * used / total, "Percent")
    return numbers
