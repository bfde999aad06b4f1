"""The paths that SageMaker asks for, and the metrics: /ping, /invocations, /metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llava_sagemaker.adapter.health import Health
from llava_sagemaker.adapter.metrics import AdapterMetrics, joined
from llava_sagemaker.adapter.request_handling import RequestHandler

METRICS_SECONDS = 5.0

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy that the environment names: what it reads is on this machine."""


def sagemaker_routes(
    handler: RequestHandler,
    health: Health,
    counts: AdapterMetrics,
    triton_metrics: Sequence[str],
) -> list[Route]:
    """The routes.

    Args:
        handler: answers what is invoked.
        health: tells whether the engine answers.
        counts: the adapter's own metrics.
        triton_metrics: `host:port` of each engine's.
    """

    async def metrics(http: HttpRequest) -> Response:
        """The engines' metrics and our own."""
        urls = (f"http://{address}/metrics" for address in triton_metrics)
        pages = await asyncio.gather(*(asyncio.to_thread(_read, url) for url in urls))
        return PlainTextResponse(joined(pages) + counts.text())

    return [
        Route("/ping", health.response, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/invocations", handler.any_kind, methods=["POST"]),
    ]


def _read(url: str) -> str:
    try:
        with _DIRECT.open(url, timeout=METRICS_SECONDS) as response:
            text: str = response.read().decode()
            return text
    except (OSError, HTTPException):
        return ""  # the engine is starting, or has failed; llava_adapter_engine_up tells
