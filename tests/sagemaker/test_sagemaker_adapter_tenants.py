"""Whose request it is, at the session adapter."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.tenants import tenant_of
from starlette.datastructures import Headers

from llava_triton.contract.errors import SessionError
from tests.adapter_process import Adapter
from tests.container_process import SESSION, Answer

ATTRIBUTES, PLAIN = "X-Amzn-SageMaker-Custom-Attributes", "X-Llava-Tenant"


@pytest.mark.parametrize(
    ("given", "tenant"),
    [
        ([], ""),
        ([(PLAIN, "alice")], "alice"),
        ([(PLAIN, " alice ")], "alice"),
        ([(ATTRIBUTES, "tenant=alice")], "alice"),
        ([(ATTRIBUTES, "trace=7; Tenant = alice;x")], "alice"),
        ([(ATTRIBUTES, "trace=7,tenant=a=b")], "a=b"),
        ([(ATTRIBUTES, "trace-7"), (ATTRIBUTES, "")], ""),
        ([(ATTRIBUTES, "tenants=alice")], ""),
        ([(ATTRIBUTES, "tenant=alice"), (PLAIN, "alice")], "alice"),
    ],
)
def test_headers_that_name_a_tenant(given: list[tuple[str, str]], tenant: str) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in given]
    assert tenant_of(Headers(raw=raw)) == tenant


@pytest.mark.parametrize(
    "given",
    [
        [(PLAIN, "")],
        [(PLAIN, "a b")],
        [(ATTRIBUTES, "tenant=")],
        [(ATTRIBUTES, "tenant=a;tenant=b")],
        [(PLAIN, "alice"), (PLAIN, "bob")],
        [(PLAIN, "alice"), (ATTRIBUTES, "tenant=bob")],
    ],
)
def test_headers_that_leave_it_open(given: list[tuple[str, str]]) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in given]
    with pytest.raises((SessionError, AdapterError)):
        tenant_of(Headers(raw=raw))


def chat(adapter: Adapter, text: str, headers: dict[str, str]) -> Answer:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    headers = {"Content-Type": "application/json", **headers}
    return adapter.request("POST", "/invocations", json.dumps(body).encode(), headers)


def test_two_tenants(adapter: Adapter) -> None:
    text = f"{uuid.uuid4().hex * 3} is the number of the account."
    names: list[dict[str, str]] = [{PLAIN: "alice"}, {ATTRIBUTES: "tenant=bob"}, {}]

    def cached(headers: dict[str, str]) -> int:
        usage: dict[str, Any] = chat(adapter, text, headers).json["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert all(cached(headers) < 16 for headers in names)
    assert all(cached(headers) > 16 for headers in names)
    opened = chat(adapter, text, {SESSION: "NEW_SESSION", PLAIN: "alice"})
    assert opened.status == 200
    session = {SESSION: opened.new_session}
    for headers in names[1:]:
        refused = chat(adapter, "And what is it?", {**session, **headers})
        assert (refused.status, refused.code) == (400, "session_not_found")
    assert chat(adapter, "And what is it?", {**session, PLAIN: "alice"}).status == 200
    refused = chat(adapter, "Hello!", {PLAIN: "a b"})
    assert (refused.status, refused.code) == (400, "invalid_request")
    assert "1 to 128 letters" in refused.json["error"]["message"]
