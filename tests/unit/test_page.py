"""What the page of `llava-triton chat --web` shows when its chat has ended, fails or is misused.
(With a browser: tests/server/test_web_page.py.)"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
from llava_cli import page_chat, web
from llava_cli.conversation import Chat, ChatTurn
from llava_cli.errors import CommandError
from llava_cli.page_chat import PageChat
from llava_triton.client import SessionError

QUESTION = {"text": "How many?", "files": []}


class Willing(Chat):
    """Answers "one", or raises `fault`."""

    fault: Exception | None = None

    def _pieces(self, turn: ChatTurn, sampling: dict[str, Any]) -> Generator[str, None, None]:
        if self.fault is not None:
            raise self.fault
        yield "one"

    def _forget(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> Willing:
    chat = Willing()
    monkeypatch.setattr(page_chat, "open_chat", lambda url: chat)
    return chat


@pytest.fixture
def chat(willing: Willing) -> Iterator[PageChat]:
    chat = PageChat("grpc://nowhere:1")
    yield chat
    chat.close()


def test_the_chat_is_set_with_every_piece(chat: PageChat) -> None:
    shown = list(web.ask(chat, QUESTION))
    assert [each[0] for each in shown] == [chat] * len(shown)
    assert shown[-1][1][-1]["content"].startswith("one")
    assert shown[-1][2]["interactive"]


def test_the_answer_events_set_the_chat_and_uploads_are_deleted() -> None:
    page = web.make_page("grpc://nowhere:1")
    for handler in (web.ask, web.ask_again, web.ask_instead):
        (event,) = [event for event in page.fns.values() if event.fn is handler]
        assert event.outputs[0] is event.inputs[0]
    assert page.delete_cache == web.UPLOADS


@pytest.mark.parametrize("ended", [False, True])
def test_a_chat_that_has_ended_is_told(chat: PageChat, ended: bool) -> None:
    chat.close()
    ((kept, messages, box, problem, _),) = web.ask(chat if ended else None, QUESTION)
    assert "value" not in kept
    assert "value" not in messages
    assert (box["value"], box["interactive"]) == (QUESTION, True)
    assert problem["value"] == web.ENDED


@pytest.mark.parametrize("fault", [RuntimeError("unheard of"), ValueError()])
def test_after_any_error_one_can_ask_again(
    chat: PageChat, willing: Willing, fault: Exception
) -> None:
    willing.fault = fault
    *_, (kept, messages, box, problem, _) = web.ask(chat, QUESTION)
    assert (kept, messages) == (chat, [])
    assert (box["value"], box["interactive"]) == (QUESTION, True)
    assert problem["visible"]
    willing.fault = None
    *_, (_, messages, _, _, _) = web.ask(chat, QUESTION)
    assert messages[-1]["content"].startswith("one")


def test_an_empty_question_changes_nothing(chat: PageChat) -> None:
    list(chat.ask(" How many? ", []))
    before = chat.messages()
    assert before[0]["content"] == "How many?"
    for asked in (lambda: chat.ask(" \n", []), lambda: chat.ask_instead(0, " ")):
        with pytest.raises(CommandError, match="the question is empty"):
            asked()
    assert chat.messages() == before


def test_a_changed_question_keeps_pictures_whose_files_are_gone(
    chat: PageChat, willing: Willing, tmp_path: Path
) -> None:
    file = tmp_path / "here.png"
    file.write_bytes(b"a picture")
    list(chat.ask("How many?", [str(file)]))
    file.unlink()
    list(chat.ask_instead(1, "Which?"))
    assert [(turn.text, turn.pictures) for turn in willing.turns] == [("Which?", [b"a picture"])]


def test_a_url_that_names_no_server_is_refused_before_the_page() -> None:
    with pytest.raises(SessionError, match="the URL is"):
        web.run("grpc://[::1", "127.0.0.1", 1)
