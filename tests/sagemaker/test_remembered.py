"""What the adapter remembers of sessions while requests of one session cross one another."""

from __future__ import annotations

import asyncio
from typing import Any

from llava_sagemaker.adapter.chat import chat_request
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.invocation import Invocation, Request
from llava_sagemaker.adapter.pictures import Pictures
from llava_sagemaker.adapter.remembered import MOST_QUESTIONS, Remembered
from llava_sagemaker.adapter.session_ids import named_session_id

from llava_triton.contract.errors import ErrorCode, SessionError

NAME = "one"
SLOW = "https://slow.example/a.png"


class Session:
    """A named session, asked without a server."""

    def __init__(self) -> None:
        self.remembered = Remembered(10)
        self.fetched = asyncio.Event()
        self.is_open = False
        self._pictures = Pictures(self._fetch, 8)

    async def ask(self, *messages: dict[str, Any]) -> Invocation:
        request = Request(None, "application/json", {}, False, False, b"", lambda _: None, "", NAME)
        fields = {"messages": list(messages)}
        return await chat_request(
            request, fields, self._pictures, self.remembered, self._check_open
        )

    def answer(self, invocation: Invocation, text: str) -> None:
        self.is_open = True
        assert invocation.session_turn is not None
        invocation.session_turn.completed(text)
        invocation.session_turn.ended("ok")

    async def _fetch(self, url: str) -> bytes:
        await self.fetched.wait()
        return b"a picture"

    async def _check_open(self, session_id: str) -> None:
        await asyncio.sleep(0)  # it asks the engine
        if not self.is_open:
            raise SessionError(ErrorCode.NOT_FOUND, "no such session")


def user(text: str, url: str | None = None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_one_name_is_opened_once() -> None:
    """The second opening would close the first one's session, with its picture."""

    async def both() -> None:
        session = Session()
        asked = [session.ask(user("a")), session.ask(user("b"))]
        first, second = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(first, Invocation)
        assert isinstance(second, AdapterError)
        assert "another request is opening the session" in second.sentence
        session.answer(first, "A")
        assert not (await session.ask(user("b"))).turn.start

    asyncio.run(both())


def test_what_was_said_while_a_picture_came_is_not_forgotten() -> None:
    async def cross() -> None:
        session = Session()
        session.answer(await session.ask(user("a")), "A")
        slow = asyncio.ensure_future(session.ask(user("c", SLOW)))
        await asyncio.sleep(0)  # it waits for its picture
        session.answer(await session.ask(user("b")), "B")
        session.fetched.set()
        session.answer(await slow, "C")
        # These messages lack b, which the session has.
        asked = await session.ask(user("a"), said("A"), user("c", SLOW), said("C"), user("d"))
        assert asked.turn.start

    asyncio.run(cross())


def test_what_is_remembered_of_a_session_does_not_grow_without_end() -> None:
    async def talk() -> None:
        session = Session()
        url = "data:image/png;base64,"
        for number in range(MOST_QUESTIONS + 2):
            asked = await session.ask(user(f"a {number}", f"{url}{number:08d}"))
            session.answer(asked, "A")
        known = session.remembered.known(named_session_id("", NAME))
        assert known is not None
        assert len(known.pictures) < 10
        assert known.said.questions is None
        # What was said is known all the same: nothing but the new question is sent.
        messages = []
        for number in range(MOST_QUESTIONS + 2):
            messages += [user(f"a {number}", f"{url}{number:08d}"), said("A")]
        assert not (await session.ask(*messages, user("b"))).turn.start

    asyncio.run(talk())
