"""Strands Agents: an agent on the OpenAI port, and on a SageMaker endpoint's OpenAI path."""

from __future__ import annotations

from typing import Any

from strands import Agent
from strands.models.openai import OpenAIModel

from tests.clients.given import Given, given


def hold(given: Given, url: str, key: str) -> None:
    """Two turns about a picture."""
    model = OpenAIModel(client_args={"base_url": url, "api_key": key}, model_id="llava")
    agent = Agent(model=model, callback_handler=None)
    image: Any = {"image": {"format": "png", "source": {"bytes": given.picture_bytes}}}
    first = agent([image, {"text": given.questions[0]}])
    assert text_of(first) == given.answers[0]
    assert text_of(agent(given.questions[1])) == given.answers[1]


def text_of(result: Any) -> str:
    """What was answered."""
    assert result.stop_reason == "end_turn"
    return "".join(part.get("text", "") for part in result.message["content"])


def main() -> None:
    """Both."""
    told = given()
    hold(told, told.openai_url, "none")
    hold(told, told.sagemaker_openai_url, told.token)


if __name__ == "__main__":
    main()
