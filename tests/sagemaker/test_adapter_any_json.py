"""Any JSON at all on the adapter's paths: an answer or one sentence; a stub stands for Triton."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.adapter_process import Adapter
from tests.properties import given, settings

PATHS = ("/v1/chat/completions", "/openai/v1/chat/completions", "/invocations")
EXAMPLES = 300

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def one_of_or_anything(*values: Any) -> st.SearchStrategy[Any]:
    """What is known, four times out of five."""
    known = st.sampled_from(values)
    return st.one_of(known, known, known, known, anything)


url = one_of_or_anything("data:image/png;base64,AAAA", "data:,a", "https://x.y/z", "s3://b/k", "")
part = one_of_or_anything("text", None) | st.fixed_dictionaries(
    {"type": one_of_or_anything("text", "image_url", "input_text", "input_image", "refusal")},
    optional={
        "text": one_of_or_anything("a", "", None),
        "refusal": one_of_or_anything("no", None),
        "image_url": url | st.fixed_dictionaries({"url": url}, optional={"detail": anything}),
    },
)
message = one_of_or_anything({}) | st.fixed_dictionaries(
    {},
    optional={
        "role": one_of_or_anything("system", "developer", "user", "user", "assistant", "tool"),
        "content": one_of_or_anything("a", "", None, "<image>", "\ud800")
        | st.lists(part, max_size=3),
        "tool_calls": one_of_or_anything([], None),
        "name": anything,
    },
)
fields: dict[str, st.SearchStrategy[Any]] = {
    "messages": one_of_or_anything([]) | st.lists(message, max_size=4),
    "prompt": one_of_or_anything("a", "", None),
    "inputs": one_of_or_anything("a", "", None, []),
    "parameters": one_of_or_anything({}, None, {"do_sample": False}),
    "image": one_of_or_anything([], "data:,a"),
    "requestType": one_of_or_anything("NEW_SESSION", "CLOSE", "CLOSE_SESSION"),
    "type": one_of_or_anything("start_session", "send_text_prompt", "close_session"),
    "session_id": one_of_or_anything("a"),
    "stream": one_of_or_anything(True, False, None),
    "stream_options": one_of_or_anything({"include_usage": True}, {}, None),
    "stop": one_of_or_anything("a", "", [""], [], None),
}
for number in ("temperature", "top_p", "top_k", "n", "logprobs", "presence_penalty", "seed"):
    fields[number] = one_of_or_anything(0, 1, 0.5, None)
for number in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
    fields[number] = one_of_or_anything(1, 0, -1, None)
for name in ("tools", "logit_bias", "response_format", "do_sample", "a field of tomorrow"):
    fields[name] = one_of_or_anything([], {}, None, False)
bodies = st.fixed_dictionaries({}, optional=fields)
headers = st.fixed_dictionaries(
    {"Content-Type": st.sampled_from(["application/json", "", "application/json; charset=utf-8"])},
    optional={
        "X-Session-Id": st.sampled_from(["", "a", "a name", "é"]),
        "X-Amzn-SageMaker-Session-Id": st.sampled_from(["NEW_SESSION", "a", "no id!"]),
        "X-Llava-Tenant": st.sampled_from(["alice", "b b", ""]),
        "X-Amzn-SageMaker-Forwarded-Api": st.just("InvokeEndpointWithResponseStream"),
        "Accept": st.sampled_from(["text/event-stream", "*/*"]),
    },
)


@given(st.sampled_from(PATHS), bodies | anything, headers)
@settings(max_examples=EXAMPLES)
def test_any_json(stub_adapter: Adapter, path: str, body: Any, headers: dict[str, str]) -> None:
    named = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    answer = stub_adapter.request("POST", path, json.dumps(body).encode(), named)
    if answer.status == 200:
        return
    error = answer.json["error"]
    assert answer.status == 400, answer.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("invalid_request", "session_not_found") or "image" in error["code"]
    assert 0 < len(error["message"]) < 1000
