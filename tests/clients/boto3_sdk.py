"""boto3: sessions, chat completions, plain texts and streams of a SageMaker endpoint."""

from __future__ import annotations

import json
from typing import Any

import boto3
from botocore.exceptions import ClientError

from tests.clients.checks import error_of
from tests.clients.given import Given, given


class Endpoint:
    """The endpoint, as boto3 invokes it."""

    def __init__(self, given: Given) -> None:
        self._client = boto3.client(
            "sagemaker-runtime",
            region_name="local",
            endpoint_url=given.runtime_url,
            aws_access_key_id="none",
            aws_secret_access_key="none",
        )
        self._name = given.endpoint

    def invoke(self, body: bytes | dict[str, Any], session: str = "", kind: str = "") -> Any:
        """One request; the answer has the body's text in place of the stream."""
        answer = self._client.invoke_endpoint(**self._arguments(body, session, kind))
        return {**answer, "Body": answer["Body"].read().decode()}

    def stream(self, body: dict[str, Any], session: str = "") -> list[bytes]:
        """What the events of a streamed answer hold."""
        arguments = self._arguments(body, session, "")
        answer = self._client.invoke_endpoint_with_response_stream(**arguments)
        return [event["PayloadPart"]["Bytes"] for event in answer["Body"]]

    def _arguments(self, body: bytes | dict[str, Any], session: str, kind: str) -> dict[str, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        arguments = {"EndpointName": self._name, "Body": data}
        arguments["ContentType"] = kind or "application/json"
        return {**arguments, "SessionId": session} if session else arguments


def main() -> None:
    """A session, and what goes without one."""
    told = given()
    endpoint = Endpoint(told)
    opened = endpoint.invoke(told.picture_bytes, "NEW_SESSION", "image/png")
    session = opened["NewSessionId"].partition(";")[0]
    prompt = endpoint.invoke({"prompt": told.questions[0]}, session)
    assert json.loads(prompt["Body"])["choices"][0]["text"] == told.answers[0]
    # By the streaming call alone.
    events = endpoint.stream(
        {"messages": [{"role": "user", "content": told.questions[1]}]}, session
    )
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in events)
    lines = b"".join(events).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == told.answers[1]
    closed = endpoint.invoke({"requestType": "CLOSE_SESSION"}, session)
    assert closed["ClosedSessionId"] == session
    lost = error_of(ClientError, lambda: endpoint.invoke({"prompt": "?"}, session))
    assert "session_not_found" in lost.response["OriginalMessage"]
    texts = endpoint.invoke({"inputs": "Hello!", "parameters": {"max_new_tokens": 4}})
    assert json.loads(texts["Body"])[0]["generated_text"]


if __name__ == "__main__":
    main()
