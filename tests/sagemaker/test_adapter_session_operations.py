"""Sessions of the adapter go back, fork, and stop an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llava_sagemaker.local.runtime import make_app

from llava_triton.client import Session
from llava_triton.server.triton_server import free_ports
from tests.adapter_process import Adapter
from tests.conftest import ROOT
from tests.container_process import Answer as HttpAnswer
from tests.sagemaker.test_sagemaker_client import Container, serving

PICTURE = (ROOT / "examples" / "pictures" / "five-shapes.png").read_bytes()
FIRST, SECOND = "How many shapes are there?", "What colour is the circle?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(adapter: Adapter, session: str, *messages: dict[str, str]) -> str:
    """Of the whole conversation. The messages lack the picture that the session has: where they are
    not what was said in it, the adapter cannot open it anew, and refuses."""
    answer = adapter.invoke({"messages": list(messages), "max_tokens": 30}, session)
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


def ask(adapter: Adapter, session: str | None, kind: str, **fields: Any) -> HttpAnswer:
    return adapter.invoke({"requestType": kind, **fields}, session)


@pytest.fixture
def session(adapter: Adapter) -> Iterator[str]:
    """One that was opened on PICTURE."""
    opened = adapter.invoke(PICTURE, "NEW_SESSION", "image/png").new_session
    yield opened
    ask(adapter, opened, "CLOSE")


def test_an_answer_is_regenerated_and_remembered(adapter: Adapter, session: str) -> None:
    first = chat(adapter, session, user(FIRST))
    again = ask(adapter, session, "REGENERATE", max_tokens=30).json
    assert (again["text_output"], again["session_id"]) == (first, session)
    assert again["num_cached_tokens"] == again["num_input_tokens"] - 1
    other = {"max_tokens": 9, "temperature": 2.0, "seed": 1, "ignore_eos": True}
    events = list(adapter.events({"requestType": "REGENERATE", **other}, session))
    text = "".join(event["text_output"] for event in events)
    assert events[-1]["finish_reason"] == "length"
    assert text != first
    chat(adapter, session, user(FIRST), said(text), user(SECOND))
    stale = adapter.invoke({"messages": [user(FIRST), said(first), user(SECOND)]}, session)
    assert (stale.status, stale.code) == (400, "invalid_request")


def test_a_rewound_session_goes_on_from_there(adapter: Adapter, session: str) -> None:
    first = chat(adapter, session, user(FIRST))
    second = chat(adapter, session, user(FIRST), said(first), user(SECOND))
    rewound = ask(adapter, session, "REWIND", turns=1).json
    assert (rewound["text_output"], rewound["finish_reason"]) == ("", "prefilled")
    assert rewound["num_cached_tokens"] >= rewound["num_input_tokens"] - 1
    assert chat(adapter, session, user(FIRST), said(first), user(SECOND)) == second
    assert ask(adapter, session, "REWIND", turns=0).status == 200
    assert chat(adapter, session, user(FIRST)) == first


def test_messages_that_go_on_from_an_earlier_turn_rewind_the_session(
    adapter: Adapter, session: str
) -> None:
    first = chat(adapter, session, user(FIRST))
    asked = [user(FIRST), said(first), user(SECOND)]
    second = chat(adapter, session, *asked)
    chat(adapter, session, *asked, said(second), user("Sure?"))
    again = adapter.invoke({"messages": asked, "max_tokens": 30}, session).json
    assert again["choices"][0]["message"]["content"] == second
    usage = again["usage"]
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert computed < len(SECOND)  # the question, and no picture
    edited = [user(FIRST), said(first), user("Is there a square?")]
    third = chat(adapter, session, *edited)
    chat(adapter, session, *edited, said(third), user("Sure?"))
    # What was taken back is not there any more.
    stale = adapter.invoke({"messages": [*asked, said(second), user("Sure?")]}, session)
    assert (stale.status, stale.code) == (400, "invalid_request")


def test_a_turn_of_tritons_format_goes_back(adapter: Adapter, session: str) -> None:
    first = chat(adapter, session, user(FIRST))
    chat(adapter, session, user(FIRST), said(first), user(SECOND))
    text = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hello!"]}
    edited = adapter.invoke({"inputs": [text], "parameters": {"rewind": 0}}, session)
    assert edited.status == 200
    refused = adapter.invoke({"inputs": [text], "parameters": {"rewind": 2}}, session)
    assert (refused.status, refused.code) == (400, "invalid_request")
    assert "it has 1 completed turns" in refused.json["error"]["message"]


def test_a_fork_goes_its_own_way(adapter: Adapter, session: str) -> None:
    first = chat(adapter, session, user(FIRST))
    second = chat(adapter, session, user(FIRST), said(first), user(SECOND))
    fork = ask(adapter, session, "FORK").new_session
    earlier = ask(adapter, session, "FORK", turns=1).new_session
    assert len({session, fork, earlier}) == 3
    ask(adapter, session, "CLOSE")
    third = chat(adapter, fork, user(FIRST), said(first), user(SECOND), said(second), user("Sure?"))
    assert third
    assert chat(adapter, earlier, user(FIRST), said(first), user(SECOND)) == second
    for each in (fork, earlier):
        assert ask(adapter, each, "CLOSE").status == 200


def test_a_stopped_answer_is_kept_and_remembered(adapter: Adapter, session: str) -> None:
    chat(adapter, session, user(FIRST))
    long = {"requestType": "REGENERATE", "max_tokens": 600, "ignore_eos": True}
    text, stopped = "", None
    for event in adapter.events(long, session):
        text += event["text_output"]
        if stopped is None:
            stopped = ask(adapter, session, "STOP").json
    assert event["finish_reason"] == "stopped"
    assert stopped is not None
    assert (stopped["text_output"], stopped["session_id"]) == ("", session)
    assert 0 < stopped["num_output_tokens"] == event["num_output_tokens"] < 600
    chat(adapter, session, user(FIRST), said(text), user(SECOND))
    assert ask(adapter, session, "STOP").json["num_output_tokens"] == 0


@pytest.mark.parametrize(
    ("kind", "named", "fields", "code", "sentence"),
    [
        ("REWIND", True, {}, "invalid_request", "says in turns how many turns to keep"),
        ("REWIND", True, {"turns": "1"}, "invalid_request", "rewind is '1'; it must be"),
        ("REWIND", True, {"turns": 10**30}, "invalid_request", "a whole number from 0 to 21474"),
        ("REWIND", True, {"turns": None}, "invalid_request", "rewind is None; it must be"),
        ("REWIND", True, {"turns": 9}, "invalid_request", "cannot be rewound to turn 9"),
        ("REWIND", True, {"turns": 0, "x": 1}, "invalid_request", "takes no 'x'"),
        ("REGENERATE", True, {}, "invalid_request", "no answer to regenerate"),
        ("REGENERATE", True, {"text": "?"}, "invalid_request", "unknown name"),
        ("FORK", True, {"turns": 1}, "invalid_request", "cannot be rewound to turn 1"),
        ("FORK", False, {}, "invalid_request", "names its session in the session header"),
        ("STOP", False, {}, "invalid_request", "names its session in the session header"),
        ("FORK", None, {}, "session_not_found", "the session is unknown"),
        ("STOP", None, {}, "session_not_found", "the session is unknown"),
        ("REWIND", None, {"turns": 0}, "session_not_found", "the session is unknown"),
    ],
)
def test_what_is_refused(
    adapter: Adapter,
    session: str,
    kind: str,
    named: bool | None,
    fields: dict[str, Any],
    code: str,
    sentence: str,
) -> None:
    given = {True: session, False: None, None: "no-such-session"}[named]
    refused = ask(adapter, given, kind, **fields)
    assert (refused.status, refused.code) == (400, code)
    assert sentence in refused.json["error"]["message"]
    assert chat(adapter, session, user(FIRST))


def test_the_clients_session_through_an_endpoint(adapter: Adapter) -> None:
    instance = Container(1)
    instance.port = adapter.port
    (port,) = free_ports(1)
    url = f"sagemaker://stub?endpoint_url=http://127.0.0.1:{port}"
    with (
        serving(make_app("stub", [instance]), port),
        Session.open(url, image=PICTURE, replay=True) as session,
    ):
        first = session.ask(FIRST, max_tokens=30)
        again = session.regenerate(max_tokens=30)
        assert (again.text, again.num_computed_tokens) == (first.text, 1)
        assert "".join(session.stream_again(max_tokens=30)) == first.text
        second = session.ask(SECOND, max_tokens=30)
        session.rewind(1)
        with session.fork() as fork:
            assert fork.ask(SECOND, max_tokens=30).text == second.text
        stream = session.stream("Go on.", max_tokens=600, ignore_eos=True)
        for _ in stream:
            stream.stop()
        assert stream.answer.finish_reason == "stopped"
        assert stream.answer.num_output_tokens < 600
