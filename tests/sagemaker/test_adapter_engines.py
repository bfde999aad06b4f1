"""The adapter in front of two engines, with stubs in their places: who gets which turn."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_triton.contract.settings import Settings
from tests.adapter_process import Adapter
from tests.container_process import Answer, question, text_of
from tests.stub_triton import StubTriton

SETTINGS = Settings(max_sessions=64, max_queued_turns=64)
PICTURE = b"\x89PNG a picture"
IN_FLIGHT = "llava_adapter_requests_in_flight"
SHOWN = "data:image/png;base64,iVBORw0KGgo="


class Pair:
    """Two stubs with one adapter in front."""

    def __init__(self, folder: Path, has_journal: bool = False) -> None:
        self.journal: set[str] | None = set() if has_journal else None
        journal = f"file://{folder}/journal" if has_journal else ""
        (folder / "settings.json").write_text(replace(SETTINGS, journal=journal).to_json())
        self._folder = folder
        self.engines = [StubTriton(self.journal) for _ in range(2)]
        self.adapter = self._adapter()

    def _adapter(self) -> Adapter:
        engines: list[Any] = self.engines
        adapter = Adapter(engines[0], self._folder, engines[1:])
        adapter.wait_until(lambda: adapter.ping() == 200)
        return adapter

    def restart_adapter(self) -> None:
        self.adapter.stop()
        self.adapter = self._adapter()

    def lose(self, number: int) -> None:
        """An engine dies, and the adapter takes notice."""
        self.engines[number].stop()
        self.wait_for(number, 0)

    def bring_back(self, number: int) -> None:
        self.engines[number] = StubTriton(self.journal, self.engines[number].port)
        self.wait_for(number, 1)

    def wait_for(self, number: int, up: int) -> None:
        name = f'llava_adapter_engine_up{{engine="{number}"}}'
        self.adapter.wait_until(lambda: self.adapter.metric(name) == up)

    def stop(self) -> None:
        self.adapter.stop()
        for engine in self.engines:
            engine.stop()

    def open(self) -> str:
        opened = self.adapter.invoke(PICTURE, "NEW_SESSION", "image/png")
        assert opened.status == 200, opened.body
        return opened.new_session

    def open_on(self, number: int) -> str:
        session = self.open()
        return session if self.engine_of(session) == number else self.open_on(number)

    def ask(self, session: str | None, text: str, tenant: str = "") -> Answer:
        body, headers = json.dumps(question(text)).encode(), {"Content-Type": "application/json"}
        if session is not None:
            headers["X-Amzn-SageMaker-Session-Id"] = session
        if tenant:
            headers["X-Llava-Tenant"] = tenant
        return self.adapter.request("POST", "/invocations", body, headers)

    def engine_of(self, session: str) -> int:
        (number,) = (n for n, engine in enumerate(self.engines) if session in engine.open)
        return number

    def asked(self, text: str) -> list[int]:
        """The engines that were asked this."""
        return [n for n, each in enumerate(self.engines) for seen in each.seen if seen.text == text]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.stop()


@pytest.fixture
def with_journal(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, has_journal=True)
    yield pair
    pair.stop()


def test_sessions_are_placed_evenly_and_stay(pair: Pair) -> None:
    with ThreadPoolExecutor(9) as pool:
        sessions = list(pool.map(lambda _: pair.open(), range(9)))
    assert sorted(len(engine.open) for engine in pair.engines) == [4, 5]
    for number, session in enumerate(sessions):
        assert text_of(pair.ask(session, f"question {number}")) == f"question {number}"
        assert pair.asked(f"question {number}") == [pair.engine_of(session)]
    # The emptier one gets the next ones.
    gone = [session for session in sessions if pair.engine_of(session) == 0]
    for session in gone:
        assert pair.adapter.invoke({"requestType": "CLOSE"}, session).status == 200
    assert {pair.engine_of(pair.open()) for _ in gone} == {0}


def test_named_sessions_are_placed_evenly_too(pair: Pair) -> None:
    for number in range(6):
        body = json.dumps({"messages": [{"role": "user", "content": f"I am {number}"}]}).encode()
        headers = {"Content-Type": "application/json", "X-Session-Id": f"name {number}"}
        chat = pair.adapter.request("POST", "/v1/chat/completions", body, headers)
        assert chat.status == 200, chat.body
    assert [len(engine.open) for engine in pair.engines] == [3, 3]


def test_named_sessions_are_entered_by_their_names_alone(pair: Pair) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}).encode()
    headers = {"Content-Type": "application/json", "X-Session-Id": "a name"}
    assert pair.adapter.request("POST", "/v1/chat/completions", body, headers).status == 200
    (session,) = pair.engines[0].open | pair.engines[1].open
    for asked in ({"requestType": "CLOSE"}, {"requestType": "FORK"}, question("?")):
        refused = pair.adapter.invoke(asked, session)
        assert (refused.status, refused.code) == (400, "invalid_request")
    assert pair.engines[0].open | pair.engines[1].open == {session}


def test_several_answers_share_their_time(pair: Pair) -> None:
    for engine in pair.engines:
        engine.may_answer.clear()
    body = {"messages": [{"role": "user", "content": "long"}], "n": 2, "max_seconds": 9}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(pair.adapter.invoke, body)
        pair.adapter.wait_until(lambda: bool(pair.asked("long")))
        began = time.monotonic()
        pair.adapter.wait_until(lambda: time.monotonic() - began > 0.5)
        for engine in pair.engines:
            engine.may_answer.set()
        assert answering.result().status == 200, answering.result().body
    pair.adapter.wait_until(lambda: not any(engine.open for engine in pair.engines))
    first, fork, end = (seen for engine in pair.engines for seen in engine.seen)
    first, fork = (json.loads(seen.inputs["sampling_parameters"][0]) for seen in (first, fork))
    assert first["max_seconds"] == 9
    assert 1 <= fork["max_seconds"] < 8.5
    assert end.end  # and nobody was asked where the session is


def test_an_adapter_that_has_forgotten_asks_the_engines(pair: Pair) -> None:
    sessions = [pair.open() for _ in range(4)]
    where = [pair.engine_of(session) for session in sessions]
    pair.restart_adapter()
    for number, session in enumerate(sessions):
        assert text_of(pair.ask(session, f"again {number}")) == f"again {number}"
        assert pair.asked(f"again {number}") == [where[number]]
    assert pair.ask("made-up", "Hello?").code == "session_not_found"


def test_a_stranger_changes_nothing_for_the_owner(pair: Pair) -> None:
    session = pair.open_on(1)
    assert pair.ask(session, "Hello?", "stranger").code == "session_not_found"
    looks = pair.asked("")
    assert text_of(pair.ask(session, "And?")) == "And?"
    assert pair.asked("") == looks  # its engine was still known
    pair.restart_adapter()
    for engine in pair.engines:
        engine.may_answer.clear()
    with ThreadPoolExecutor(2) as pool:
        refused = pool.submit(pair.ask, session, "Hello?", "stranger")
        pair.adapter.wait_until(lambda: len(pair.asked("")) == len(looks) + 2)
        answered = pool.submit(pair.ask, session, "Still?")
        pair.adapter.wait_until(lambda: pair.adapter.metric(IN_FLIGHT) == 2)
        for engine in pair.engines:
            engine.may_answer.set()
        assert refused.result().code == "session_not_found"
        assert text_of(answered.result()) == "Still?"
    assert pair.asked("Still?") == [1]


def test_an_engine_that_is_full_may_have_the_session(with_journal: Pair) -> None:
    pair = with_journal
    session = pair.open_on(1)
    pair.restart_adapter()
    pair.engines[1].is_full = True
    assert pair.ask(session, "Hello?").code == "unavailable"
    assert pair.engine_of(session) == 1  # nor was it resumed on the other one
    pair.engines[1].is_full, pair.engines[0].is_full = False, True
    pair.restart_adapter()
    assert text_of(pair.ask(session, "Hello?")) == "Hello?"
    assert pair.asked("Hello?")[-1] == 1


def test_a_resumed_session_stays_where_its_turn_was_refused(with_journal: Pair) -> None:
    pair = with_journal
    session = pair.open_on(1)
    pair.engines[1].open.clear()
    refused = pair.adapter.invoke(b"no picture", session, "image/png")
    assert refused.code == "image_invalid", refused.body
    number, looks = pair.engine_of(session), pair.asked("")
    assert text_of(pair.ask(session, "Hello?")) == "Hello?"
    assert pair.asked("Hello?") == [number]
    assert pair.asked("") == looks  # it was known to be there


def test_a_turn_without_a_session_goes_where_less_is_under_way(pair: Pair) -> None:
    busy = pair.engines[0]
    busy.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(pair.ask, None, "long")
        pair.adapter.wait_until(lambda: pair.asked("long") == [0])
        for _ in range(3):
            assert text_of(pair.ask(None, "short")) == "short"
        busy.may_answer.set()
        assert text_of(waits.result()) == "long"
    assert pair.asked("short") == [1, 1, 1]


def test_forks_and_stops_go_to_the_engine_of_their_session(pair: Pair) -> None:
    sessions = [pair.open() for _ in range(2)]
    for session in sessions:
        engine = pair.engines[pair.engine_of(session)]
        forks = [
            pair.adapter.invoke({"requestType": "FORK"}, session).new_session for _ in range(3)
        ]
        assert set(forks) < engine.open
        assert pair.adapter.invoke({"requestType": "STOP"}, session).status == 200
        assert engine.seen[-1].stop == session


def test_a_dead_engine_takes_its_own_sessions_only(pair: Pair) -> None:
    first, second = pair.open(), pair.open()
    assert {pair.engine_of(first), pair.engine_of(second)} == {0, 1}
    lost, stays = (first, second) if pair.engine_of(first) == 0 else (second, first)
    other = pair.engines[1]
    other.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(pair.ask, stays, "in flight")
        pair.adapter.wait_until(lambda: pair.asked("in flight") == [1])
        pair.lose(0)
        assert pair.adapter.ping() == 200
        other.may_answer.set()
        assert text_of(under_way.result()) == "in flight"
    assert pair.ask(lost, "Hello?").code == "session_not_found"
    assert text_of(pair.ask(stays, "Hello?")) == "Hello?"
    assert pair.engine_of(pair.open()) == 1
    pair.bring_back(0)
    assert pair.engine_of(pair.open()) == 0
    pair.lose(0)
    pair.lose(1)
    pair.adapter.wait_until(lambda: pair.adapter.ping() == 503)


def test_sessions_of_a_dead_engine_are_resumed_on_another(with_journal: Pair) -> None:
    pair = with_journal
    sessions = [pair.open() for _ in range(4)]
    lost = [session for session in sessions if pair.engine_of(session) == 0]
    pair.lose(0)
    for session in lost:
        assert text_of(pair.ask(session, "Hello?")) == "Hello?"
        assert pair.engines[1].seen[-1].resume
        # It is there now: nothing is to be brought back.
        assert text_of(pair.ask(session, "And?")) == "And?"
        assert not pair.engines[1].seen[-1].resume
    assert pair.adapter.metric("llava_adapter_turns_resumed_total") == len(lost)
    assert pair.ask("made-up", "Hello?").code == "session_not_found"
    closed = pair.adapter.invoke({"requestType": "CLOSE"}, lost[0])
    assert closed.status == 200
    assert pair.ask(lost[0], "Hello?").code == "session_not_found"


def test_all_turns_of_a_lost_session_go_to_one_engine(with_journal: Pair) -> None:
    pair = with_journal
    session = pair.open()
    for engine in pair.engines:
        engine.open.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: pair.ask(session, f"{n}?"), range(8)))
    assert [text_of(answer) for answer in answers] == [f"{n}?" for n in range(8)]
    pair.engine_of(session)  # one


def test_a_fork_of_a_lost_session(with_journal: Pair) -> None:
    pair = with_journal
    session = pair.open()
    for engine in pair.engines:
        engine.open.clear()
    fork = pair.adapter.invoke({"requestType": "FORK"}, session)
    assert fork.status == 200, fork.body
    assert pair.engine_of(fork.new_session) == pair.engine_of(session)


def test_a_fork_of_nothing_is_tried_once(with_journal: Pair) -> None:
    pair = with_journal
    fork = pair.adapter.invoke({"requestType": "FORK"}, "made-up")
    assert (fork.status, fork.code) == (400, "session_not_found")
    asked = [seen for engine in pair.engines for seen in engine.seen if seen.resume or seen.fork]
    assert len(asked) == 2


def test_what_was_said_is_remembered_when_a_session_is_resumed(with_journal: Pair) -> None:
    pair = with_journal
    session = pair.adapter.invoke({"requestType": "NEW_SESSION"}, "NEW_SESSION").new_session
    first = {"role": "user", "content": "Hello?"}
    told = pair.adapter.invoke({"messages": [first]}, session)
    for engine in pair.engines:
        engine.open.clear()
    again = pair.adapter.invoke({"requestType": "NEW_SESSION", "resume": session}, "NEW_SESSION")
    assert again.new_session == session
    said = [first, told.json["choices"][0]["message"], {"role": "user", "content": "And?"}]
    assert pair.adapter.invoke({"messages": said}, session).status == 200
    seen = pair.engines[pair.engine_of(session)].seen[-1]
    assert (seen.text, seen.start, "history" in seen.inputs) == ("And?", False, False)


def test_a_new_session_can_be_an_old_one(with_journal: Pair) -> None:
    """For SageMaker, which may refuse the ID of a session whose instance has gone."""
    pair = with_journal
    session = pair.open()

    def lost() -> None:
        for engine in pair.engines:
            engine.open.clear()

    adapter, asked = pair.adapter, {"requestType": "NEW_SESSION", "resume": session}
    for body in (asked, {**asked, "text": "Hello?"}, {**asked, "image": SHOWN}):
        lost()
        told = adapter.invoke(body, "NEW_SESSION")
        assert told.new_session == session
        assert text_of(pair.ask(session, "And?")) == "And?"
    for data in (b"", json.dumps(question("Hello?")).encode()):
        lost()
        headers = {
            "X-Amzn-SageMaker-Session-Id": "NEW_SESSION",
            "X-Amzn-SageMaker-Custom-Attributes": f"trace=7; resume={session}",
            "Content-Type": "application/json",
        }
        told = adapter.request("POST", "/invocations", data, headers)
        assert told.status == 200, told.body
        assert told.new_session == session
    unknown = adapter.invoke({**asked, "resume": "made-up"}, "NEW_SESSION")
    assert (unknown.status, unknown.code) == (400, "session_not_found")
    wrong = adapter.invoke({**asked, "resume": "no ID!"}, "NEW_SESSION")
    assert (wrong.status, wrong.code) == (400, "invalid_request")
