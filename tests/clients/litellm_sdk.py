"""LiteLLM: its routes openai/, sagemaker_chat/ and sagemaker/."""

from __future__ import annotations

from typing import Any

import litellm

from tests.clients.given import Given, given

AWS = {
    "aws_access_key_id": "none",
    "aws_secret_access_key": "none",
    "aws_region_name": "eu-west-1",
}


def both(given: Given) -> list[dict[str, Any]]:
    """The conversation up to the second question."""
    picture = {"type": "image_url", "image_url": {"url": given.data_uri}}
    asked = [picture, {"type": "text", "text": given.questions[0]}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": given.answers[0]},
        {"role": "user", "content": given.questions[1]},
    ]


def whole(given: Given, **where: Any) -> None:
    """One answer, with its usage."""
    answer: Any = litellm.completion(messages=both(given), temperature=0, **where)
    assert answer.choices[0].message.content == given.answers[1]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def streamed(given: Given, **where: Any) -> None:
    """The same piece by piece."""
    chunks: list[Any] = list(litellm.completion(messages=both(given), stream=True, **where))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == given.answers[1]
    assert len(pieces) > 2


def main() -> None:
    """All of it."""
    told = given()
    port = {"model": "openai/llava", "api_base": told.openai_url, "api_key": "none"}
    whole(told, **port)
    streamed(told, **port)
    chat: dict[str, Any] = {"model": f"sagemaker_chat/{told.endpoint}", **AWS}
    whole(told, **chat, sagemaker_base_url=told.invocations_url)
    streamed(told, **chat, sagemaker_base_url=f"{told.invocations_url}-response-stream")
    text: Any = litellm.completion(
        model=f"sagemaker/{told.endpoint}",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=8,
        sagemaker_base_url=told.invocations_url,
        **AWS,
    )
    assert text.choices[0].message.content


if __name__ == "__main__":
    main()
