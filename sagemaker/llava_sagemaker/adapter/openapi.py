"""The OpenAPI description of the adapter's paths, served at /openapi.json."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from llava_sagemaker.adapter.chat_parameters import TAKEN_ONLY
from llava_sagemaker.adapter.session_ids import SESSION_NAME
from llava_triton.contract.sampling_parameters import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
)

Schema = dict[str, Any]


def _constant(*values: Any) -> Schema:
    return {"enum": list(values)}


_STOP: Schema = {"type": "string", "maxLength": MAX_STOP_CHARACTERS}
_PENALTY: Schema = {"type": ["number", "null"], "minimum": -MAX_PENALTY, "maximum": MAX_PENALTY}
_TOKENS: Schema = {"type": ["integer", "null"], "minimum": 1}
_TAKEN: dict[str, Schema] = {
    "model": {"description": "Any: there is one."},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": MAX_TEMPERATURE},
    "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "top_k": {"type": ["integer", "null"], "minimum": -1},
    "seed": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SEED},
    "stop": {
        "anyOf": [
            _STOP,
            {"type": "array", "items": _STOP, "maxItems": MAX_STOP_STRINGS},
            {"type": "null"},
        ]
    },
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0},
    "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "min_tokens": {"type": ["integer", "null"], "minimum": 0},
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "logit_bias": {"type": ["object", "null"]},
    "logprobs": {"type": ["boolean", "null"]},
    "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS},
    "response_format": {"type": ["object", "null"]},
    "structured_outputs": {"type": ["object", "null"]},
    "truncation": _constant("auto", "disabled", None),
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {"type": ["object", "null"]},
}
"""Fields of a chat completion that are followed. All others are ignored, or see TAKEN_ONLY."""


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "integer", "minimum": 0}
_STRING_OR_NULL: Schema = {"type": ["string", "null"]}
_URL: Schema = {"type": "string", "pattern": "^(data|https|s3):"}
_SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": _constant("invalid_request_error", "server_error"),
                    "param": _STRING_OR_NULL,
                    "code": _TEXT,
                },
                *("message", "type", "param", "code"),
            )
        },
        "error",
    ),
    "Message": _object(
        {
            "role": _constant("system", "developer", "user", "assistant"),
            "content": {"anyOf": [_STRING_OR_NULL, {"type": "array", "items": _reference("Part")}]},
        },
        "role",
    ),
    "Part": {
        "anyOf": [
            _STRING_OR_NULL,
            _object(
                {
                    "type": _constant("text", "input_text", "output_text"),
                    "text": _STRING_OR_NULL,
                },
                "type",
            ),
            _object({"type": _constant("refusal"), "refusal": _STRING_OR_NULL}, "type"),
            _object(
                {
                    "type": _constant("image_url", "input_image"),
                    "image_url": {"anyOf": [_URL, _object({"url": _URL}, "url")]},
                },
                *("type", "image_url"),
            ),
            _object(
                {
                    "type": _constant("video_url", "input_video"),
                    "video_url": {"anyOf": [_URL, _object({"url": _URL}, "url")]},
                },
                *("type", "video_url"),
            ),
        ]
    },
    "ChatCompletionRequest": _object(
        {
            "messages": {"type": "array", "items": _reference("Message"), "minItems": 1},
            **_TAKEN,
            **{name: _constant(*values, None) for name, values in TAKEN_ONLY.items()},
        },
        "messages",
    ),
    "ChatCompletion": _object(
        {
            "id": _TEXT,
            "object": _constant("chat.completion"),
            "created": _NUMBER,
            "model": _TEXT,
            "choices": {"type": "array", "items": _reference("Choice")},
            "usage": _reference("Usage"),
        },
        *("id", "object", "created", "model", "choices", "usage"),
    ),
    "Choice": _object(
        {
            "index": _NUMBER,
            "message": _object(
                {"role": _constant("assistant"), "content": _TEXT}, "role", "content"
            ),
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": _constant("stop", "length"),
        },
        *("index", "message", "logprobs", "finish_reason"),
    ),
    "Usage": _object(
        {
            "prompt_tokens": _NUMBER,
            "completion_tokens": _NUMBER,
            "total_tokens": _NUMBER,
            "prompt_tokens_details": _object({"cached_tokens": _NUMBER}, "cached_tokens"),
            "num_forgotten_turns": _NUMBER,
        },
        *("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"),
        "num_forgotten_turns",
    ),
    "Model": _object(
        {"id": _TEXT, "object": _constant("model"), "created": _NUMBER, "owned_by": _TEXT},
        *("id", "object", "created", "owned_by"),
    ),
    "Models": _object(
        {
            "object": _constant("list"),
            "data": {"type": "array", "items": _reference("Model")},
        },
        *("object", "data"),
    ),
}


def description(prefixes: tuple[str, ...]) -> dict[str, Any]:
    """All of it.

    Args:
        prefixes: where OpenAI's paths are.
    """
    paths: dict[str, Any] = {
        "/health": {"get": _operation("Whether the model answers", {"200": {}}, 401, 503)},
        "/ping": {"get": _operation("The same", {"200": {}}, 401, 503)},
        "/version": {
            "get": _operation("The version", _answer(_object({"version": _TEXT}, "version")), 401)
        },
        "/metrics": {
            "get": _operation(
                "Metrics for Prometheus", {"200": {"text/plain": {"schema": _TEXT}}}, 401
            )
        },
        "/invocations": {"post": _INVOCATION},
    }
    for prefix in prefixes:
        paths |= _openai_paths(prefix)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llava-triton", "version": version("llava-triton")},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _openai_paths(prefix: str) -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    answers = _answer(_reference("ChatCompletion"))
    answers["200"]["text/event-stream"] = {"schema": _TEXT}
    chat = _operation("Answer a conversation", answers, 400, 401, 408, 413, 415, 500, 503)
    request = {"schema": _reference("ChatCompletionRequest")}
    chat["requestBody"] = {"required": True, "content": {"application/json": request}}
    deleted = _object(
        {"id": _TEXT, "object": _constant("session"), "deleted": _constant(True)},
        *("id", "object", "deleted"),
    )
    end = _operation("End a named session", _answer(deleted), 400, 401, 408, 413, 415, 500, 503)
    end["parameters"] = [{"name": SESSION_NAME, "in": "header", "required": True, "schema": _TEXT}]
    return {
        f"{prefix}/chat/completions": {"post": chat},
        f"{prefix}/sessions": {"delete": end},
        f"{prefix}/models": {
            "get": _operation("All models", _answer(_reference("Models")), 401),
        },
        f"{prefix}/models/{{name}}": {
            "parameters": [name],
            "get": _operation("One model", _answer(_reference("Model")), 401, 404),
        },
    }


def _answer(schema: Schema) -> dict[str, dict[str, Any]]:
    return {"200": {"application/json": {"schema": schema}}}


def _operation(summary: str, answers: dict[str, dict[str, Any]], *failures: int) -> dict[str, Any]:
    error = {"application/json": {"schema": _reference("Error")}}
    contents = {**answers, **{str(status): error for status in failures}}
    responses = {
        status: {"description": summary if status == "200" else "Refused", "content": content}
        for status, content in contents.items()
    }
    return {"summary": summary, "responses": responses}


_INVOCATION = {
    **_operation(
        "Any request that SageMaker passes on, chat completions among them; see docs/sagemaker.md",
        {"200": {"*/*": {}}},
        *(400, 401, 408, 413, 415, 500, 503),
    ),
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "image/*": {},
            "video/*": {},
        },
    },
}
