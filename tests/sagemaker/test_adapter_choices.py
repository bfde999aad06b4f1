"""Several answers to one chat completion, and one that fills the context, in front of Triton."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from tests.adapter_process import Adapter
from tests.conftest import ROOT
from tests.container_process import Answer
from tests.sagemaker.test_sagemaker_adapter import content, events_of, said, user

PICTURE = (ROOT / "examples" / "pictures" / "five-shapes.png").read_bytes()
ASKED = {"messages": [user("Say something of it. Anything.", PICTURE)]}
SAMPLED = {"temperature": 2.0, "seed": 7, "max_tokens": 20, "ignore_eos": True}
ACTIVE, IDLE = (f'llava_sessions{{state="{state}"}}' for state in ("active", "idle"))


def post(adapter: Adapter, body: dict[str, Any], **headers: str) -> Answer:
    headers = {"Content-Type": "application/json", **headers}
    return adapter.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)


def chat(adapter: Adapter, **body: Any) -> Any:
    answer = post(adapter, body)
    assert answer.status == 200, answer.body
    return answer.json


def test_several_answers_share_their_prompt(adapter: Adapter) -> None:
    idle = adapter.metric(IDLE)
    computed, reused = prompt_tokens(adapter)
    first = chat(adapter, **ASKED, **SAMPLED)
    completion = chat(adapter, **ASKED, n=4, **SAMPLED)
    texts = [choice["message"]["content"] for choice in completion["choices"]]
    assert [choice["index"] for choice in completion["choices"]] == [0, 1, 2, 3]
    assert texts[0] == content(first)
    assert len(set(texts)) > 1
    assert {choice["finish_reason"] for choice in completion["choices"]} <= {"stop", "length"}
    usage = completion["usage"]
    assert usage["prompt_tokens"] == first["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] > first["usage"]["completion_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # Each answer but the first computes the prompt's last token alone.
    in_all = 5 * usage["prompt_tokens"]
    adapter.wait_until(lambda: sum(prompt_tokens(adapter)) == computed + reused + in_all)
    newly = in_all - sum(
        each["prompt_tokens_details"]["cached_tokens"] for each in (first["usage"], usage)
    )
    newly -= 3 * usage["prompt_tokens"]
    assert prompt_tokens(adapter)[0] == computed + newly + 3
    again = chat(adapter, **ASKED, n=4, **SAMPLED)
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    # The seed of another answer is as many higher.
    second = chat(adapter, **{**ASKED, **SAMPLED, "seed": 8})
    assert content(second) == texts[1]
    adapter.wait_until(lambda: adapter.metric(IDLE) <= idle)  # others' may expire


def prompt_tokens(adapter: Adapter) -> tuple[float, float]:
    """Computed and reused so far."""
    name = "llava_prompt_tokens_total"
    return (
        adapter.metric(f'{name}{{source="computed"}}'),
        adapter.metric(f'{name}{{source="reused"}}'),
    )


def test_several_answers_streamed(adapter: Adapter) -> None:
    body = {**ASKED, "n": 3, **SAMPLED, "logprobs": True}
    whole = json.loads(adapter.invoke(body).body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events_of(adapter.invoke({**body, **options}).body)
    texts, reasons, logprobs = ["", "", ""], ["", "", ""], [0, 0, 0]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert not reasons[index], "nothing follows the end of a choice"
        texts[index] += choice["delta"].get("content", "")
        logprobs[index] += len((choice["logprobs"] or {"content": []})["content"])
        reasons[index] = choice["finish_reason"] or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert logprobs == [len(choice["logprobs"]["content"]) for choice in whole["choices"]]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_several_answers(adapter: Adapter, stream: bool) -> None:
    idle = adapter.metric(IDLE)
    body = {**ASKED, "n": 3, "stream": stream, "ignore_eos": True, "max_tokens": 800}
    connection = http.client.HTTPConnection("127.0.0.1", adapter.port, timeout=60.0)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    adapter.wait_until(lambda: adapter.metric(ACTIVE) == 3)
    if stream:
        assert connection.getresponse().readline()
    connection.close()
    adapter.wait_until(lambda: adapter.metric(ACTIVE) == 0 and adapter.metric(IDLE) <= idle)
    assert chat(adapter, **ASKED, max_tokens=2)["choices"]


@pytest.mark.parametrize("header", ["X-Session-Id", "X-Amzn-SageMaker-Session-Id"])
def test_several_answers_in_a_session_are_refused(adapter: Adapter, header: str) -> None:
    refused = post(adapter, {**ASKED, "n": 2}, **{header: "a-name"})
    assert refused.status == 400
    assert "n above 1 came with a session" in refused.json["error"]["message"]
    assert refused.json["error"]["param"] == "n"


def test_several_answers_are_of_messages(adapter: Adapter) -> None:
    text = adapter.invoke({"prompt": "Hello?", "n": 2})
    assert "n above 1 is for messages only" in text.json["error"]["message"]


def test_a_chat_that_fills_the_context_goes_on(adapter: Adapter) -> None:
    messages = [user("What is in the picture?", PICTURE)]
    forgotten = 0
    for number in range(60):
        refused = {"messages": messages, "max_tokens": 8}
        completion = chat(adapter, messages=messages, truncation="auto", max_tokens=8)
        forgotten = completion["usage"]["num_forgotten_turns"]
        if forgotten:
            assert adapter.invoke(refused).status in (200, 400)
            break
        messages += [said(content(completion)), user(f"{number}? " * 20)]
    assert forgotten > 1
