"""The paths that clients of OpenAI's API ask for.

Each is there twice. The runtime of SageMaker offers `/endpoints/NAME/openai/v1/...`, and what of
that path a container sees is not documented.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.health import Health
from llava_sagemaker.adapter.openai_answers import MODEL
from llava_sagemaker.adapter.openapi import description
from llava_sagemaker.adapter.request_handling import RequestHandler

PREFIXES = ("/v1", "/openai/v1")


def openai_routes(handler: RequestHandler, health: Health) -> list[Route]:
    """The routes.

    Args:
        handler: answers chat completions.
        health: tells whether the engine answers.
    """
    model: dict[str, Any] = {
        "id": MODEL,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llava-triton",
    }

    async def models(http: HttpRequest) -> Response:
        """All models."""
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(http: HttpRequest) -> Response:
        """The model of this name."""
        name = http.path_params["name"]
        if name == MODEL:
            return JSONResponse(model)
        return AdapterError(
            404, "model_not_found", f"there is no model {name[:80]!r}; there is {MODEL!r}", "model"
        ).response()

    async def tell_version(http: HttpRequest) -> Response:
        """The adapter's version."""
        return JSONResponse({"version": version("llava-triton")})

    described = JSONResponse(description(PREFIXES))

    async def openapi(http: HttpRequest) -> Response:
        """The OpenAPI description of all paths."""
        return described

    routes = [
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/health", health.response, methods=["GET"]),
        Route("/version", tell_version, methods=["GET"]),
    ]
    for prefix in PREFIXES:
        routes += [
            Route(f"{prefix}/chat/completions", handler.chat, methods=["POST"]),
            Route(f"{prefix}/sessions", handler.end_session, methods=["DELETE"]),
            Route(f"{prefix}/models", models, methods=["GET"]),
            Route(f"{prefix}/models/{{name:path}}", one_model, methods=["GET"]),
        ]
    return routes
