"""The adapter's ASGI application: its routes, and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llava_sagemaker.adapter.access import ApiKey
from llava_sagemaker.adapter.engines import Engines
from llava_sagemaker.adapter.errors import AdapterError, as_adapter_error
from llava_sagemaker.adapter.health import Health
from llava_sagemaker.adapter.metrics import AdapterMetrics
from llava_sagemaker.adapter.openai_paths import openai_routes
from llava_sagemaker.adapter.request_handling import RequestHandler
from llava_sagemaker.adapter.sagemaker_paths import sagemaker_routes
from llava_sagemaker.adapter.session_ids import NEW_SESSION_ID
from llava_triton.contract.settings import Settings


def make_app(
    triton: Sequence[str],
    metrics: Sequence[str],
    settings: Settings,
    *,
    image_hosts: Sequence[str] = (),
    image_buckets: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    api_key: str = "",
) -> Starlette:
    """The ASGI application.

    Args:
        triton: `host:port` of the gRPC endpoint of each engine's Triton.
        metrics: `host:port` of the metrics of each.
        settings: of the model repository.
        image_hosts, image_buckets: from where pictures may be fetched.
        cors_origins: web pages of these origins may read the answers; `*`: those of all.
        api_key: who asks must know it; empty: anyone may ask.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Here, where the event loop runs: gRPC's channels belong to it.
        engines = Engines(triton, settings)
        health, counts = Health(engines), AdapterMetrics(engines)
        handler = RequestHandler(engines, counts, settings, image_hosts, image_buckets)
        app.router.routes += sagemaker_routes(handler, health, counts, metrics)
        app.router.routes += openai_routes(handler, health)
        yield
        await engines.close()

    middleware = []
    if cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=[NEW_SESSION_ID],
            )
        )
    if api_key:
        middleware.append(Middleware(ApiKey, key=api_key))
    return Starlette(
        lifespan=lifespan, middleware=middleware, exception_handlers=EXCEPTION_HANDLERS
    )


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """No route fits."""
    assert isinstance(error, HTTPException)
    asked = f"{http.method} {http.url.path[:200]}"
    if error.status_code == 405:
        methods = (error.headers or {}).get("Allow", "")
        told = AdapterError(
            405, "method_not_allowed", f"{asked} is not served; use {methods} on this path"
        )
    else:
        told = AdapterError(
            error.status_code,
            "not_found",
            f"{asked} is not served; chat completions are at POST /v1/chat/completions, and "
            "SageMaker's requests at POST /invocations",
        )
    return told.response(error.headers)


async def _unforeseen(http: HttpRequest, error: Exception) -> Response:
    return as_adapter_error(error).response()


EXCEPTION_HANDLERS = {HTTPException: _http_error, Exception: _unforeseen}
"""What is told where no route fits, or something of ours fails."""
