"""LangChain: ChatOpenAI on the OpenAI port, SagemakerEndpoint and its chat model on an endpoint."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import boto3
from langchain_aws.chat_models.sagemaker_endpoint import (
    ChatModelContentHandler,
    ChatSagemakerEndpoint,
)
from langchain_aws.llms.sagemaker_endpoint import LLMContentHandler, SagemakerEndpoint
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from tests.clients.given import Given, given


def conversation(given: Given) -> list[BaseMessage]:
    """Up to the second question."""
    picture = {"type": "image_url", "image_url": {"url": given.data_uri}}
    return [
        HumanMessage([picture, {"type": "text", "text": given.questions[0]}]),
        AIMessage(given.answers[0]),
        HumanMessage(given.questions[1]),
    ]


def chat_openai(given: Given) -> None:
    """Whole, streamed, asynchronous, with a system message."""
    model = ChatOpenAI(base_url=given.openai_url, api_key="none", model="llava", temperature=0)
    messages = conversation(given)
    assert model.invoke(messages[:1]).content == given.answers[0]
    second = model.invoke(messages)
    assert second.content == given.answers[1]
    assert second.usage_metadata is not None
    assert second.usage_metadata["input_token_details"]["cache_read"] > 0
    pieces = [piece.content for piece in model.stream(messages)]
    assert "".join(map(str, pieces)) == given.answers[1]
    assert len(pieces) > 2
    assert asyncio.run(model.ainvoke(messages)).content == given.answers[1]
    assert model.invoke([SystemMessage("Be brief."), *messages]).content


class Text(LLMContentHandler):  # type: ignore[misc]
    """As LangChain's documentation has it for models of Hugging Face."""

    content_type = "application/json"
    accepts = "application/json"

    def transform_input(self, prompt: str, model_kwargs: dict[str, Any]) -> bytes:
        """A prompt as a request."""
        return json.dumps({"inputs": prompt, "parameters": model_kwargs}).encode()

    def transform_output(self, output: Any) -> str:
        """An answer's text, or that of a line of a streamed one."""
        if isinstance(output, bytes):
            is_event = output.startswith(b"data:")
            return str(json.loads(output[5:])["token"]["text"]) if is_event else ""
        return str(json.loads(output.read())[0]["generated_text"])


class Chat(ChatModelContentHandler):  # type: ignore[misc]
    """Messages as OpenAI's API takes them."""

    content_type = "application/json"
    accepts = "application/json"

    def transform_input(self, prompt: Any, model_kwargs: dict[str, Any]) -> bytes:
        """Messages as a request."""
        return json.dumps({"messages": prompt, **model_kwargs}).encode()

    def transform_output(self, output: Any) -> Any:
        """An answer as a message."""
        if isinstance(output, bytes):
            is_chunk = output.startswith(b"data: {")
            choices = json.loads(output[6:])["choices"] if is_chunk else []
            return AIMessage(choices[0]["delta"].get("content") or "" if choices else "")
        return AIMessage(json.loads(output.read())["choices"][0]["message"]["content"])


def sagemaker_endpoint(given: Given) -> None:
    """Both classes, whole and streamed."""
    client = boto3.client(
        "sagemaker-runtime",
        region_name="local",
        endpoint_url=given.runtime_url,
        aws_access_key_id="none",
        aws_secret_access_key="none",
    )
    arguments = {
        "endpoint_name": given.endpoint,
        "client": client,
        "model_kwargs": {"max_new_tokens": 8, "do_sample": False},
    }
    model = SagemakerEndpoint(content_handler=Text(), **arguments)
    answer = model.invoke("Hello!")
    assert answer
    pieces = list(
        SagemakerEndpoint(content_handler=Text(), streaming=True, **arguments).stream("Hello!")
    )
    assert "".join(pieces) == answer
    assert len(pieces) > 2
    chat = ChatSagemakerEndpoint(content_handler=Chat(), **arguments)
    assert chat.invoke([HumanMessage("Hello!")]).content == answer


def main() -> None:
    """All of it."""
    chat_openai(given())
    sagemaker_endpoint(given())


if __name__ == "__main__":
    main()
