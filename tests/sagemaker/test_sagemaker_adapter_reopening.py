"""Chats that give the whole conversation inside a session: when it is opened anew, with what."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from llava_triton.server.triton_server import TritonServer
from tests.adapter_process import Adapter
from tests.conftest import ROOT
from tests.container_process import question

PICTURE = (ROOT / "examples" / "pictures" / "five-shapes.png").read_bytes()
FIRST, SECOND = "How many shapes are there?", "What colour is the circle?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(adapter: Adapter, messages: list[dict[str, str]], session: str) -> Any:
    answer = adapter.invoke({"messages": messages}, session)
    assert answer.status == 200, answer.body
    return answer.json


def content(completion: Any) -> str:
    return str(completion["choices"][0]["message"]["content"])


def cached_tokens(completion: Any) -> int:
    return int(completion["usage"]["prompt_tokens_details"]["cached_tokens"])


def shown(adapter: Adapter) -> str:
    """A session that was opened on PICTURE."""
    return adapter.invoke(PICTURE, "NEW_SESSION", "image/png").new_session


@pytest.mark.parametrize("messages", [[user(FIRST)], [user("Hi"), said("Hello"), user(FIRST)]])
def test_nobody_chooses_the_id_of_a_session(
    adapter: Adapter, messages: list[dict[str, str]]
) -> None:
    chosen = uuid.uuid4().hex
    for _ in range(2):  # the first try has opened nothing
        refused = adapter.invoke({"messages": messages}, chosen)
        assert (refused.status, refused.code) == (400, "session_not_found")
    later = adapter.invoke(question(SECOND), chosen)
    assert (later.status, later.code) == (400, "session_not_found")


def test_the_picture_of_the_opening_stays(adapter: Adapter) -> None:
    turn_by_turn, whole = shown(adapter), shown(adapter)
    first = content(chat(adapter, [user(FIRST)], turn_by_turn))
    expected = chat(adapter, [user(SECOND)], turn_by_turn)
    assert content(chat(adapter, [user(FIRST)], whole)) == first
    second = chat(adapter, [user(FIRST), said(first), user(SECOND)], whole)
    assert content(second) == content(expected)
    assert second["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    for session in (turn_by_turn, whole):
        adapter.invoke({"requestType": "CLOSE"}, session)


def test_a_picture_that_would_be_lost_is_said_to_be(adapter: Adapter) -> None:
    session = shown(adapter)
    answer = content(chat(adapter, [user(FIRST)], session))
    # Another conversation than the session's, and none of its messages holds the picture.
    refused = adapter.invoke({"messages": [user("Hi"), said("No."), user(SECOND)]}, session)
    assert (refused.status, refused.code) == (400, "invalid_request")
    # The session is what it was.
    assert cached_tokens(chat(adapter, [user(FIRST), said(answer), user(SECOND)], session)) > 0
    adapter.invoke({"requestType": "CLOSE"}, session)


def test_an_empty_opening_is_remembered(adapter: Adapter) -> None:
    session = adapter.invoke({"requestType": "NEW_SESSION"}).new_session
    first = chat(adapter, [user(FIRST)], session)
    second = chat(adapter, [user(FIRST), said(content(first)), user(SECOND)], session)
    assert cached_tokens(second) >= first["usage"]["prompt_tokens"]
    adapter.invoke({"requestType": "CLOSE"}, session)


def test_after_a_restart_nothing_is_answered_without_its_picture(
    server: TritonServer, demo_repository: Any
) -> None:
    conversation = [user("Hi"), said("Hello"), user(SECOND)]
    sessions: list[str] = []
    for _ in range(2):
        adapter = Adapter(server, demo_repository)
        try:
            adapter.wait_until(lambda: adapter.ping() == 200)  # noqa: B023
            for session in sessions:
                refused = adapter.invoke({"messages": conversation}, session)
                assert (refused.status, refused.code) == (400, "invalid_request")
                assert "send only the new user message" in refused.json["error"]["message"]
            sessions.append(shown(adapter))
            answers = {content(chat(adapter, [user(SECOND)], session)) for session in sessions}
            assert len(answers) == 1
        finally:
            adapter.stop()
