"""What a chat completion may ask of its answer under names that only OpenAI has."""

from __future__ import annotations

from typing import Any

from llava_sagemaker.adapter.errors import invalid_request

OUTPUT_FIELDS = ("logprobs", "top_logprobs")


def output_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters that follow from `OUTPUT_FIELDS`.

    Args:
        given: the request's fields, none of them null.

    Raises:
        AdapterError: invalid_request.
    """
    wanted, most = given.get("logprobs", False), given.get("top_logprobs", 0)
    if not isinstance(wanted, bool):
        raise invalid_request("logprobs must be true or false; top_logprobs says how many")
    if wanted:
        return {"logprobs": most}  # the engine checks it
    if most != 0:
        raise invalid_request('top_logprobs needs "logprobs": true; add it or leave both out')
    return {}
