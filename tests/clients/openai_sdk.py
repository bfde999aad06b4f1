"""OpenAI's own library: whole, streamed, asynchronous; errors; named sessions; SageMaker's path."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from tests.clients.checks import error_of
from tests.clients.given import Given, given


def first(given: Given) -> list[Any]:
    """The first question, with its picture."""
    picture = {"type": "image_url", "image_url": {"url": given.data_uri}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": given.questions[0]}]}]


def both(given: Given) -> list[Any]:
    """The whole conversation up to the second question."""
    said = {"role": "assistant", "content": given.answers[0]}
    return [*first(given), said, {"role": "user", "content": given.questions[1]}]


def whole(client: openai.OpenAI, given: Given) -> None:
    """Two turns; the second finds the first one's prompt in the cache."""
    asked = client.chat.completions.create(model="", messages=first(given))
    assert asked.choices[0].message.content == given.answers[0]
    assert asked.choices[0].finish_reason == "stop"
    second = client.chat.completions.create(model="any", messages=both(given), temperature=0)
    assert second.choices[0].message.content == given.answers[1]
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached > 0


def streamed(client: openai.OpenAI, given: Given) -> None:
    """Piece by piece, then the usage."""
    chunks = list(
        client.chat.completions.create(
            model="llava",
            messages=both(given),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, usage = chunks
    text = [piece.choices[0].delta.content or "" for piece in pieces]
    assert "".join(text) == given.answers[1]
    assert len(text) > 2
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert usage.usage is not None
    assert usage.usage.completion_tokens > 0


async def asynchronous(url: str, given: Given) -> None:
    """Several at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        asked = [
            client.chat.completions.create(model="llava", messages=first(given)) for _ in range(4)
        ]
        for answer in await asyncio.gather(*asked):
            assert answer.choices[0].message.content == given.answers[0]
        stream = await client.chat.completions.create(
            model="llava", messages=first(given), stream=True
        )
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(text) == given.answers[0]


def refused(client: openai.OpenAI, given: Given) -> None:
    """Errors come as the library's own."""
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    wrong = error_of(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            model="llava", messages=first(given), tools=[tool], modalities=["text", "audio"]
        ),
    )
    assert (wrong.code, wrong.type) == ("invalid_request", "invalid_request_error")
    assert "tools, modalities are not supported" in wrong.message
    missing = error_of(
        openai.NotFoundError, lambda: client.embeddings.create(model="llava", input="a")
    )
    assert "POST /v1/embeddings is not served" in missing.message


def in_a_named_session(client: openai.OpenAI, given: Given) -> None:
    """The picture travels once."""
    named = {"X-Session-Id": "openai-sdk"}
    asked = client.chat.completions.create(
        model="llava", messages=first(given), extra_headers=named
    )
    assert asked.choices[0].message.content == given.answers[0]
    second = client.chat.completions.create(
        model="llava",
        messages=[{"role": "user", "content": given.questions[1]}],
        extra_headers=named,
    )
    assert second.choices[0].message.content == given.answers[1]


def main() -> None:
    """All of it."""
    told = given()
    with openai.OpenAI(base_url=told.openai_url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["llava"]
        whole(client, told)
        streamed(client, told)
        refused(client, told)
        in_a_named_session(client, told)
    asyncio.run(asynchronous(told.openai_url, told))
    sagemaker = told.sagemaker_openai_url
    with openai.OpenAI(base_url=sagemaker, api_key=told.token, max_retries=0) as client:
        whole(client, told)
        streamed(client, told)
    stranger = openai.OpenAI(base_url=sagemaker, api_key="none", max_retries=0)
    error_of(openai.PermissionDeniedError, lambda: whole(stranger, told))


if __name__ == "__main__":
    main()
