"""What a chat completion may ask of its answer under names that only OpenAI has."""

from __future__ import annotations

from typing import Any

from llava_sagemaker.adapter.errors import invalid_request

OUTPUT_FIELDS = ("logprobs", "top_logprobs", "response_format")


def output_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters that follow from `OUTPUT_FIELDS`.

    Args:
        given: the request's fields, none of them null.

    Raises:
        AdapterError: invalid_request.
    """
    return {**_logprobs(given), **_form(given)}


def _logprobs(given: dict[str, Any]) -> dict[str, Any]:
    wanted, most = given.get("logprobs", False), given.get("top_logprobs", 0)
    if not isinstance(wanted, bool):
        raise invalid_request("logprobs must be true or false; top_logprobs says how many")
    if wanted:
        return {"logprobs": most}  # the engine checks it
    if most != 0:
        raise invalid_request('top_logprobs needs "logprobs": true; add it or leave both out')
    return {}


def _form(given: dict[str, Any]) -> dict[str, Any]:
    if "response_format" not in given:
        return {}
    wanted = given["response_format"]
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return {}
    if "structured_outputs" in given:
        raise invalid_request("response_format and structured_outputs say the same; give one")
    if kind == "json_object":
        return {"structured_outputs": {"json_object": True}}
    if kind == "json_schema":
        named = wanted.get("json_schema")
        if isinstance(named, dict) and isinstance(named.get("schema"), dict):
            return {"structured_outputs": {"json": named["schema"]}}
    raise invalid_request(
        'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": '
        '"json_schema", "json_schema": {"name": "...", "schema": {...}}}'
    )
