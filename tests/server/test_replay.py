"""Sessions that the server has lost, opened again by the client with all that was said."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from llava_triton.client import ErrorCode, Session, SessionError
from llava_triton.client.replay import ReplayTransport
from llava_triton.client.transport import (
    LostConnectionError,
    Transport,
    TurnMessage,
    regenerating,
    rewinding,
)
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import not_found
from llava_triton.contract.history import history_from_json, history_to_json
from llava_triton.server.triton_server import TritonServer, free_ports
from tests.conftest import ROOT

PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.*"))
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "Which colors are there?")
LIMIT: dict[str, Any] = {"max_tokens": 40}


@pytest.fixture(params=["grpc", "http", "grpc stream"])
def talk(request: pytest.FixtureRequest, server: TritonServer) -> Callable[[bool], list[str]]:
    """Holds a conversation; each time asked to, the session is gone before a question."""
    url = server.http_url if request.param == "http" else server.grpc_url

    def hold(lose: bool) -> list[str]:
        answers = []
        with Session.open(url, image=PICTURES[0], replay=True) as session:
            for index, question in enumerate(QUESTIONS):
                if index == 2:
                    session.add_image(PICTURES[1])
                if lose:
                    with Session.open(url, session_id=session.id):
                        pass  # its end ends also ours
                image = PICTURES[2] if index == 1 else None
                if request.param == "grpc stream":
                    answers.append("".join(session.stream(question, image, **LIMIT)))
                else:
                    answers.append(session.ask(question, image, **LIMIT).text)
        return answers

    return hold


def test_the_answers_are_those_of_a_session_that_was_not_lost(
    talk: Callable[[bool], list[str]],
) -> None:
    undisturbed = talk(False)
    assert talk(True) == undisturbed
    assert len(set(undisturbed)) == len(QUESTIONS)


def test_nothing_is_replayed_unless_asked_for(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURES[0]) as session:
        with Session.open(server.grpc_url, session_id=session.id):
            pass
        with pytest.raises(SessionError) as caught:
            session.ask(QUESTIONS[0])
        assert caught.value.code is ErrorCode.NOT_FOUND


def test_a_turn_that_was_refused_is_not_remembered(server: TritonServer) -> None:
    with Session.open(server.grpc_url, image=PICTURES[0]) as undisturbed:
        expected = [undisturbed.ask(question, **LIMIT) for question in QUESTIONS]
    with Session.open(server.grpc_url, image=PICTURES[0], replay=True) as session:
        assert session.ask(QUESTIONS[0], **LIMIT).text == expected[0].text
        with pytest.raises(SessionError, match="temperature is 9"):
            session.ask("And now?", temperature=9)
        with session.stream("Go on.", max_tokens=600, ignore_eos=True) as left:
            next(iter(left))
        with Session.open(server.grpc_url, session_id=session.id):
            pass
        for index in (1, 2):
            again = session.ask(QUESTIONS[index], **LIMIT)
            assert again.text == expected[index].text
            assert again.num_input_tokens == expected[index].num_input_tokens


def test_a_server_that_dies_and_comes_back(demo_repository: Path, tmp_path: Path) -> None:
    ports = free_ports(3)
    with TritonServer(demo_repository, *ports, log=tmp_path / "first.log") as server:
        with Session.open(server.grpc_url, image=PICTURES[0]) as session:
            expected = [session.ask(question, **LIMIT).text for question in QUESTIONS]
        session = Session.open(server.grpc_url, image=PICTURES[0], replay=True)
        assert session.ask(QUESTIONS[0], **LIMIT).text == expected[0]
        endless = iter(session.stream("Go on.", max_tokens=900, ignore_eos=True))
        next(endless)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(SessionError, match="cannot be opened again") as caught:
            list(endless)
        assert caught.value.code is ErrorCode.UNAVAILABLE
    with TritonServer(demo_repository, *ports, log=tmp_path / "second.log"), session:
        assert session.ask(QUESTIONS[1], **LIMIT).text == expected[1]
        assert "".join(session.stream(QUESTIONS[2], **LIMIT)) == expected[2]


# What no real server does on demand.


class Scripted(Transport):
    """Streams given pieces, a character a token; an exception among them is raised."""

    def __init__(self, *scripts: list[str | SessionError]) -> None:
        self.scripts = list(scripts)
        self.opened: list[TurnMessage] = []
        self.left = 0
        self.opens = True

    def open(self, turn: TurnMessage) -> tuple[str, Delta]:
        if not self.opens:
            raise LOST
        self.opened.append(turn)
        return f"session {len(self.opened)}", Delta("", "prefilled", 1, 0, 0, 0.0)

    def ask(self, turn: TurnMessage) -> Delta:
        return [*self.stream(turn)][-1]

    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        assert turn.session_id == f"session {len(self.opened)}"
        script = self.scripts.pop(0)
        try:
            for index, piece in enumerate(script):
                if isinstance(piece, SessionError):
                    raise piece
                reason = "stop" if index == len(script) - 1 else ""
                numbers = (1, index, 0, 0.0)
                yield Delta(piece, reason, *numbers, logprobs=tuple(piece))  # type: ignore[arg-type]
        except GeneratorExit:
            self.left += 1
            raise

    def close(self) -> None:
        pass


LOST = LostConnectionError("the server is gone")


def session_on(transport: Transport) -> ReplayTransport:
    replaying = ReplayTransport(transport)
    replaying.open(TurnMessage("any", start=True))
    return replaying


def pieces(transport: Transport, **sampling: Any) -> list[str]:
    question = TurnMessage("any", text="What?", sampling=sampling)
    deltas = list(transport.stream(question))
    texts = [delta.text for delta in deltas if delta.text]
    assert "".join("".join(delta.logprobs) for delta in deltas) == "".join(texts)
    return texts


@pytest.mark.parametrize(
    ("again", "rest"),
    [
        (["a red", " square", ""], [" square"]),
        (["a", " r", "ed square"], [" square"]),
        (["a red"], []),
    ],
)
def test_only_what_is_missing_comes_after_a_loss(again: list[Any], rest: list[str]) -> None:
    scripted = Scripted(["a ", "red", LOST], again, [not_found("gone")], ["yes"])
    transport = session_on(scripted)
    assert pieces(transport) == ["a ", "red", *rest]
    assert pieces(transport) == ["yes"]
    # The whole answer is remembered, once.
    [told] = scripted.opened[-1].history
    assert told.answer == "".join(again)


@pytest.mark.parametrize("again", [["a blue", " square"], ["a r"]])
def test_another_answer_is_an_error(again: list[Any]) -> None:
    scripted = Scripted(["a ", "red", LOST], again)
    with pytest.raises(SessionError, match="differs from what had come"):
        pieces(session_on(scripted))
    # No turn goes on that nobody reads.
    assert scripted.left == 1


@pytest.mark.parametrize(
    ("sampling", "repeatable"),
    [({}, True), ({"temperature": 1, "seed": 7}, True), ({"temperature": 1}, False)],
)
def test_an_answer_drawn_at_random_cannot_go_on(sampling: dict[str, Any], repeatable: bool) -> None:
    transport = session_on(Scripted(["a ", LOST], ["a ", "cat"]))
    if repeatable:
        assert pieces(transport, **sampling) == ["a ", "cat"]
    else:
        with pytest.raises(LostConnectionError):
            pieces(transport, **sampling)
    # Before its first piece any answer can.
    assert pieces(session_on(Scripted([LOST], ["a cat"])), **sampling) == ["a cat"]


def told(scripted: Scripted) -> tuple[list[tuple[str, str, int]], list[bytes]]:
    """What the session was last opened with: texts, answers, numbers of pictures; the pictures."""
    opened = scripted.opened[-1]
    return [(each.text, each.answer, each.images) for each in opened.history], [*opened.images]


def test_what_was_taken_back_is_not_told_again() -> None:
    gone = not_found("gone")
    scripted = Scripted(["one"], [""], ["two"], [""], ["again"], [gone], ["three"], [gone])
    transport = session_on(scripted)
    transport.ask(TurnMessage("any", text="A", images=[b"1"]))
    transport.ask(TurnMessage("any", images=[b"2"]))
    transport.ask(TurnMessage("any", text="B", images=[b"3"]))
    transport.ask(TurnMessage("any", images=[b"4"]))
    transport.ask(regenerating("any", {}))
    assert transport.ask(TurnMessage("any", text="C")).text == "three"
    assert told(scripted) == ([("A", "one", 1), ("B", "again", 2)], [b"1", b"2", b"3"])
    # A history does not say that picture 2 was there before question B.
    assert transport.ask(rewinding("any", 1)).finish_reason == "prefilled"
    assert told(scripted) == ([("A", "one", 1)], [b"1", b"2"])
    assert transport.ask(rewinding("any", 0)).finish_reason == "prefilled"
    assert told(scripted) == ([], [])


def test_pictures_are_told_again_where_they_stood() -> None:
    """Those that came before a question, without one, are before its text."""
    scripted = Scripted([""], ["one"], ["two"], [not_found("gone")], ["three"])
    transport = session_on(scripted)
    transport.ask(TurnMessage("any", images=[b"1"]))
    transport.ask(TurnMessage("any", text="A or B", images=[b"2", b"3"], positions=(2, 5)))
    transport.ask(TurnMessage("any", text="C", images=[b"4"]))
    assert transport.ask(TurnMessage("any", text="D")).text == "three"
    history = scripted.opened[-1].history
    assert [(each.images, each.image_positions) for each in history] == [(3, (2, 5)), (1, None)]
    assert history_from_json(history_to_json(list(history))) == history


def test_a_session_that_cannot_be_rewound_is_remembered_whole() -> None:
    scripted = Scripted(["one"], [not_found("gone")], [LOST], ["two"])
    transport = session_on(scripted)
    transport.ask(TurnMessage("any", text="A", images=[b"1"]))
    scripted.opens = False
    with pytest.raises(SessionError, match="cannot be opened again"):
        transport.ask(rewinding("any", 0))
    scripted.opens = True
    transport.ask(TurnMessage("any", text="B"))
    assert told(scripted) == ([("A", "one", 1)], [b"1"])


def test_a_full_server_has_not_lost_the_session() -> None:
    full = SessionError(ErrorCode.UNAVAILABLE, "try later")
    with pytest.raises(SessionError, match="try later"):
        pieces(session_on(Scripted([full])))


def test_a_lost_session_that_forgets_is_opened_as_one() -> None:
    transport = Scripted(["It is", " red"], [LOST], ["blue"], ["so"])
    replaying = session_on(transport)
    assert "truncation" not in transport.opened[0].sampling
    pieces(replaying, truncation="auto")
    pieces(replaying)
    assert transport.opened[1].sampling == {"truncation": "auto"}
    assert len(transport.opened[1].history) == 1
