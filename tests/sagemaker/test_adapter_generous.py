"""Requests as real clients send them, read generously; a stub stands for Triton."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import pytest

from llava_triton.contract.history import history_from_json
from tests.adapter_process import Adapter
from tests.container_process import Answer
from tests.stub_triton import Seen, StubTriton

PICTURE = "data:image/jpeg;base64,iVBORw0KGgo"  # a PNG by its bytes, without padding
CHAT = "/v1/chat/completions"
NAME = "X-Session-Id"


def ask(adapter: Adapter, body: dict[str, Any], **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named = {"Content-Type": "application/json", **named}
    return adapter.request("POST", CHAT, json.dumps(body).encode(), named)


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: Any) -> dict[str, Any]:
    return message("user", content)


def said(content: Any, **more: Any) -> dict[str, Any]:
    return message("assistant", content, **more)


def text(content: Any) -> dict[str, Any]:
    return {"type": "text", "text": content}


def picture(url: Any = PICTURE, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def sampling_of(seen: Seen) -> dict[str, Any]:
    """What was asked for, without the adapter's own time limit."""
    sampling = json.loads(seen.inputs["sampling_parameters"][0])
    del sampling["max_seconds"]
    return dict(sampling)


def past_of(seen: Seen) -> list[tuple[str, str, int]]:
    """What was told of earlier turns."""
    turns = (
        history_from_json(seen.inputs["history"][0].decode()) if "history" in seen.inputs else ()
    )
    return [(turn.text, turn.answer, turn.images) for turn in turns]


def asked(triton: StubTriton) -> list[Seen]:
    """All turns, without looks at whether a session is open."""
    return [seen for seen in triton.seen if seen.inputs]


# Messages.

Past = list[tuple[str, str, int]]
NEWER_PICTURE = {"type": "input_image", "image_url": PICTURE}
CONVERSATIONS: dict[str, tuple[list[Any], Past, str, int]] = {
    "two questions": ([user("a"), user("b")], [], "a\nb", 0),
    "two answers": ([user("a"), said("b"), said("c"), user("d")], [("a", "b\nc", 0)], "d", 0),
    "system first": ([message("system", "s"), user("a")], [], "s\na", 0),
    "developer first": ([message("developer", "s"), user("a")], [], "s\na", 0),
    "systems anywhere": (
        [
            message("system", "s"),
            message("system", "t"),
            user("a"),
            said("b"),
            message("developer", "u"),
            user("c"),
            message("system", "v"),
        ],
        [("s\nt\na", "b", 0)],
        "u\nc\nv",
        0,
    ),
    "only the system": ([message("system", "s")], [], "s", 0),
    "a greeting first": ([said("Hi!"), user("a")], [(" ", "Hi!", 0)], "a", 0),
    "room for the answer": ([user("a"), said("")], [], "a", 0),
    "null answers": ([user("a"), said(None), user("b")], [("a", "", 0)], "b", 0),
    "an empty past": ([user(None), said("b"), user("c")], [(" ", "b", 0)], "c", 0),
    "no tools": ([user("a"), said("b", tool_calls=[]), user("c")], [("a", "b", 0)], "c", 0),
    "more fields": ([message("user", "a", name="me", cache_control={})], [], "a", 0),
    "a refusal": (
        [user("a"), said([{"type": "refusal", "refusal": "no"}]), user("c")],
        [("a", "no", 0)],
        "c",
        0,
    ),
    "a picture alone": ([user([picture()])], [], " ", 1),
    "a picture, then a text": ([user([picture(), text("a")])], [], "a", 1),
    "a text, then pictures": ([user([text("a"), picture(), picture()])], [], "a", 2),
    "a picture, and a text of its own": ([user([picture()]), user("a")], [], "a", 1),
    "no detail": ([user([picture(detail=None), text("a")])], [], "a", 1),
    "a plain URL": ([user([{"type": "image_url", "image_url": PICTURE}, text("a")])], [], "a", 1),
    "the newer API": (
        [
            user(
                [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": PICTURE}]
            )
        ],
        [],
        "a",
        1,
    ),
    "empty parts": ([user([text(""), text(None), None, "a", picture()])], [], "a", 1),
    "the placeholder": (
        [user("<image>"), said("<image>"), user("What is <image>?")],
        [("<image>", "<image>", 0)],
        "What is <image>?",
        0,
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_messages(stub_adapter: Adapter, stub_triton: StubTriton, name: str) -> None:
    messages, past, question, pictures = CONVERSATIONS[name]
    answer = ask(stub_adapter, {"messages": messages})
    assert answer.status == 200, answer.body
    seen = stub_triton.seen[-1]
    assert (past_of(seen), seen.text) == (past, question)
    assert len(seen.inputs.get("image", [])) == pictures


Places = list[int] | None
BETWEEN = [text("Is "), picture(), text(" or "), picture(), text(" larger?")]
PLACES: dict[str, tuple[list[Any], str, Places, list[Places]]] = {
    "between texts": ([user(BETWEEN)], "Is  or  larger?", [3, 7], []),
    "before, and behind": ([user([picture(), text("a"), picture()])], "a", [0, 1], []),
    "all before": ([user([picture(), picture(), text("a")])], "a", None, []),
    "all behind": ([user([text("a"), text("b"), picture()])], "a\nb", None, []),
    "behind the system": (
        [message("system", "Ö!"), user(BETWEEN)],
        "Ö!\nIs  or  larger?",
        [6, 10],
        [],
    ),
    "of joined messages": (
        [user([picture(), text("a")]), user(BETWEEN), user([picture()])],
        "a\nIs  or  larger?",
        [0, 5, 9, 17],
        [],
    ),
    "in the past": (
        [user(BETWEEN), said("No."), user([picture(), text("a")])],
        "a",
        None,
        [[3, 7]],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_pictures_stand_where_the_message_has_them(
    stub_adapter: Adapter, stub_triton: StubTriton, name: str
) -> None:
    messages, question, places, past = PLACES[name]
    answer = ask(stub_adapter, {"messages": messages})
    assert answer.status == 200, answer.body
    seen = stub_triton.seen[-1]
    told = seen.inputs.get("image_positions")
    assert (seen.text, told and json.loads(told[0])) == (question, places)
    if past:
        turns = history_from_json(seen.inputs["history"][0].decode())
        assert [turn.image_positions and list(turn.image_positions) for turn in turns] == past


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([user("")], "neither text nor a picture"),
        ([user([])], "neither text nor a picture"),
        ([user("a"), said("b")], "last message"),
        ([user("a"), said(None, tool_calls=[{}])], "message 2 calls tools"),
        ([user("a"), message("tool", "b")], "message 2 has the role 'tool'"),
        ([user("a"), message(["user"], "b")], "message 2 has the role"),
        ([user("a"), said([picture()]), user("b")], "message 2 is the assistant's"),
        ([user([{"type": "input_audio"}])], "no text, image_url or video_url: 'input_audio'"),
        ([user([3])], "must be a string or a list"),
        ([user([text(3)])], "must be a string"),
        (["a"], "message 1 is no object"),
    ],
)
def test_messages_that_cannot_be_followed(
    stub_adapter: Adapter, messages: list[Any], sentence: str
) -> None:
    refused = ask(stub_adapter, {"messages": messages})
    assert (refused.status, refused.json["error"]["param"]) == (400, "messages")
    assert sentence in refused.json["error"]["message"]


# Other fields.

HELLO: dict[str, Any] = {"messages": [user("Hello!")]}
NO_EFFECT: dict[str, Any] = {
    "model": "gpt-4o",
    "user": "me",
    "store": False,
    "n": 1,
    "logprobs": False,
    "top_logprobs": None,
    "logit_bias": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "stop": None,
    "max_tokens": None,
    "max_completion_tokens": None,
    "temperature": None,
    "stream": False,
    "stream_options": None,
    "some_future_field": {"of": "another vendor"},
}


def test_fields_without_effect(stub_adapter: Adapter, stub_triton: StubTriton) -> None:
    assert ask(stub_adapter, {**HELLO, **NO_EFFECT}).status == 200
    assert sampling_of(stub_triton.seen[-1]) == {"frequency_penalty": 0, "presence_penalty": 0}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"temperature": 0, "top_p": 0}, {"temperature": 0, "top_k": 1}),
        ({"temperature": 1, "top_p": 0.0}, {"temperature": 1, "top_k": 1}),
        ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}),
        ({"max_completion_tokens": None, "max_tokens": 9}, {"max_tokens": 9}),
        ({"max_new_tokens": 7}, {"max_tokens": 7}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0}),
        ({"do_sample": True}, {"temperature": 1}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"stop": ""}, {"stop": []}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", ""], "stop_sequences": None}, {"stop": ["a"]}),
    ],
)
def test_values_mean_what_they_mean_elsewhere(
    stub_adapter: Adapter, stub_triton: StubTriton, given: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert ask(stub_adapter, {**HELLO, **given}).status == 200
    assert sampling_of(stub_triton.seen[-1]) == meant


def test_all_that_cannot_be_followed_is_named_at_once(stub_adapter: Adapter) -> None:
    wanted = {
        "tools": [{"type": "function"}],
        "modalities": ["audio"],
        "audio": {},
        "chat_template": "x",
    }
    refused = ask(stub_adapter, {**HELLO, **wanted, "unknown": 1})
    error = refused.json["error"]
    assert refused.status == 400
    names = re.fullmatch(r"(.*) are not supported; leave them out", error["message"])
    assert names is not None
    assert set(names[1].split(", ")) == set(wanted)
    assert error["param"] in wanted


@pytest.mark.parametrize("stream", [False, True])
def test_finish_reason_and_cached_tokens(stub_adapter: Adapter, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(stub_adapter, {**HELLO, "stream": stream, **options})
    if stream:
        *_, last, usage = (json.loads(line[6:]) for line in answer.body.split(b"\n\n")[:-2])
        whole = {**last, "usage": usage["usage"]}
    else:
        whole = answer.json
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


def test_a_packed_body(stub_adapter: Adapter) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    packed = gzip.compress(json.dumps(HELLO).encode())
    assert stub_adapter.request("POST", CHAT, packed, headers).status == 200
    bomb = gzip.compress(bytes(64 << 20))
    assert stub_adapter.request("POST", CHAT, bomb, headers).status == 413


# Simple texts.


def test_a_prompt_in_a_session(stub_adapter: Adapter, stub_triton: StubTriton) -> None:
    opened = stub_adapter.invoke({"requestType": "NEW_SESSION"}).new_session
    answer = stub_adapter.invoke({"prompt": "Hello!", "max_tokens": 5, "unknown": 1}, opened)
    assert answer.json["choices"] == [
        {"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer.json["usage"]["completion_tokens"] == 1
    seen = stub_triton.seen[-1]
    assert (seen.session, seen.start, seen.end) == (opened, False, False)
    assert sampling_of(seen) == {"max_tokens": 5}
    assert stub_adapter.invoke({"requestType": "CLOSE_SESSION"}, opened).status == 200
    assert stub_adapter.invoke({"prompt": "Hello?"}, opened).code == "session_not_found"


def test_inputs_and_parameters(stub_adapter: Adapter, stub_triton: StubTriton) -> None:
    parameters = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    body = {"inputs": "Hello!", "parameters": parameters, "image": PICTURE}
    assert stub_adapter.invoke(body).json == [{"generated_text": "Hello!"}]
    seen = stub_triton.seen[-1]
    assert (seen.start, seen.end, seen.inputs["image"]) == (True, True, [PICTURE.encode()])
    assert sampling_of(seen) == {"max_tokens": 5, "temperature": 0}


def test_streamed_texts(stub_adapter: Adapter) -> None:
    streamed = stub_adapter.invoke({"inputs": "Hello!", "stream": True})
    *tokens, last = (json.loads(line[5:]) for line in streamed.body.split(b"\n\n")[:-1])
    assert [each["token"]["text"] for each in tokens] == ["H", "ello!"]
    assert (last["generated_text"], last["details"]["finish_reason"]) == ("Hello!", "eos_token")
    streamed = stub_adapter.invoke({"prompt": "Hello!"}, accept="text/event-stream")
    *pieces, done = streamed.body.split(b"\n\n")[:-1]
    assert done == b"data: [DONE]"
    choices = [json.loads(piece[6:])["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == "Hello!"
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": "a", "parameters": [1]}, "parameters"),
        ({"inputs": "a", "parameters": {"return_full_text": True}}, "return_full_text"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ],
)
def test_texts_that_cannot_be_followed(
    stub_adapter: Adapter, body: dict[str, Any], param: str
) -> None:
    refused = stub_adapter.invoke(body)
    assert (refused.status, refused.json["error"]["param"]) == (400, param), refused.body


# Sessions that clients name.


def test_a_named_session_goes_on(stub_adapter: Adapter, stub_triton: StubTriton) -> None:
    for number, question in enumerate(("a", "b", "c")):
        messages = [user([picture(), text(question)] if number == 0 else question)]
        assert ask(stub_adapter, {"messages": messages}, X_Session_Id="one").status == 200
    turns = asked(stub_triton)[-3:]
    assert [seen.text for seen in turns] == ["a", "b", "c"]
    assert [seen.start for seen in turns] == [True, False, False]
    assert len({seen.session for seen in turns}) == 1
    assert not any(seen.end for seen in turns)
    assert [seen.rewind for seen in turns] == [None, None, None]


def test_a_whole_conversation_in_a_named_session(
    stub_adapter: Adapter, stub_triton: StubTriton
) -> None:
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(("a", "b", "c")):
        messages.append(user([picture(), text(question)] if number == 0 else question))
        answer = ask(stub_adapter, {"messages": messages}, X_Session_Id="whole")
        messages.append(answer.json["choices"][0]["message"])
        seen = stub_triton.seen[-1]
        assert (seen.text, seen.start) == (question, number == 0)
        assert ("image" in seen.inputs, past_of(seen)) == (number == 0, [])
        assert seen.rewind is None
    # The second question is asked otherwise.
    assert ask(stub_adapter, {"messages": [*messages[:2], user("B")]}, X_Session_Id="whole").json[
        "choices"
    ]
    seen = stub_triton.seen[-1]
    assert (seen.text, seen.start, seen.rewind) == ("B", False, 1)
    # Something else was said, and the picture left out: the messages count.
    edited = [user("a"), said("x"), user("d")]
    assert ask(stub_adapter, {"messages": edited}, X_Session_Id="whole").status == 200
    seen = stub_triton.seen[-1]
    assert (seen.start, past_of(seen), "image" in seen.inputs) == (True, [("a", "x", 0)], False)


def test_names_are_ones_own(stub_adapter: Adapter, stub_triton: StubTriton) -> None:
    for tenant in ("alice", "bob"):
        ask(stub_adapter, HELLO, X_Session_Id="mine", X_Llava_Tenant=tenant)
    ask(stub_adapter, HELLO, X_Session_Id="other")
    alice, bob, other = asked(stub_triton)[-3:]
    assert all(seen.start for seen in (alice, bob, other))
    assert len({alice.session, bob.session, other.session}) == 3
    # Nobody gets into a session by its name as an ID.
    refused = stub_adapter.invoke(HELLO, "mine")
    assert refused.code == "session_not_found"


def test_a_named_session_that_was_lost(stub_adapter: Adapter, stub_triton: StubTriton) -> None:
    assert ask(stub_adapter, HELLO, X_Session_Id="lost").status == 200
    stub_triton.open.clear()
    refused = ask(stub_adapter, HELLO, X_Session_Id="lost")
    assert (refused.status, refused.code) == (400, "session_not_found")
    assert NAME in refused.json["error"]["message"]
    assert ask(stub_adapter, HELLO, X_Session_Id="lost").status == 200
    assert stub_triton.seen[-1].start
    # Whoever sends the whole conversation notices nothing.
    stub_triton.open.clear()
    whole = [user("Hello!"), said("Hello!"), user("b")]
    assert ask(stub_adapter, {"messages": whole}, X_Session_Id="lost").status == 200
    seen = stub_triton.seen[-1]
    assert (seen.start, past_of(seen)) == (True, [("Hello!", "Hello!", 0)])


def test_the_adapter_has_forgotten_a_named_session(
    stub_adapter: Adapter, stub_triton: StubTriton
) -> None:
    assert ask(stub_adapter, HELLO, X_Session_Id="forgotten").status == 200
    session = stub_triton.seen[-1].session
    for number in range(10):
        ask(stub_adapter, HELLO, X_Session_Id=f"later {number}")
    assert ask(stub_adapter, HELLO, X_Session_Id="forgotten").status == 200
    seen = stub_triton.seen[-1]
    assert (seen.session, seen.start) == (session, False)


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_no_name(stub_adapter: Adapter, name: str) -> None:
    refused = ask(stub_adapter, HELLO, X_Session_Id=name)
    assert (refused.status, refused.code) == (400, "invalid_request")
    assert NAME in refused.json["error"]["message"]
