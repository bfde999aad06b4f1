"""How the adapter sends turns to Triton, and leaves them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from llava_sagemaker.adapter import turns
from llava_sagemaker.adapter.turns import Triton, packed, turn

from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from tests.stub_triton import StubTriton

PATIENCE_SECONDS = 20.0


@pytest.fixture
def stub() -> Iterator[StubTriton]:
    stub = StubTriton()
    stub.open.update(["s", "other"])
    yield stub
    stub.stop()


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("opens", [False, True])
def test_a_turn_that_is_left_before_it_begins(stub: StubTriton, opens: bool) -> None:
    """A request cancels it, not the call: Triton would end the sequence."""

    async def leave() -> None:
        triton = Triton(stub.grpc_address)
        stub.may_answer.clear()
        waiting = asyncio.create_task(triton.whole(turn("s", text="What?", start=opens)))
        await until(lambda: len(stub.seen) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: len(stub.cancelled) == 1)
        assert stub.cancelled[0][0] == "s"
        stub.may_answer.set()
        assert (await triton.whole(turn("s", text="Still there?"))).text == "Still there?"
        assert stub.calls_ended == 0
        await triton.close()

    asyncio.run(leave())


def test_a_turn_that_is_left_on_its_way_is_cancelled_when_it_begins(stub: StubTriton) -> None:
    """The engine did not know it yet, so the first request found nothing."""

    async def leave() -> None:
        triton = Triton(stub.grpc_address)
        stub.may_answer.clear()
        stub.may_end.clear()
        waiting = asyncio.create_task(triton.whole(turn("s", text="What?")))
        await until(lambda: len(stub.seen) == 1)
        stub.knows_waiting = False
        waiting.cancel()
        await until(lambda: len(stub.cancelled) == 1)
        stub.cancelled.clear()
        stub.go_on_once()  # its first piece comes
        await until(lambda: len(stub.cancelled) == 1)
        stub.may_answer.set()
        stub.may_end.set()
        assert (await triton.whole(turn("s", text="Still there?"))).text == "Still there?"
        assert stub.calls_ended == 0
        await triton.close()

    asyncio.run(leave())


def test_a_turn_that_is_left_in_its_middle_is_cancelled_at_once(stub: StubTriton) -> None:
    async def leave() -> None:
        triton = Triton(stub.grpc_address)
        stub.may_end.clear()
        pieces = triton.pieces(turn("s", text="What?"))
        assert (await anext(pieces)).text == "W"
        await pieces.aclose()
        await until(lambda: len(stub.cancelled) == 1)
        stub.may_end.set()
        assert (await triton.whole(turn("s", text="And?"))).text == "And?"
        assert stub.calls_ended == 0
        await triton.close()

    asyncio.run(leave())


def test_a_turn_that_cannot_be_undone_has_its_call_cancelled(
    stub: StubTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton does not say whether it knows of it."""
    monkeypatch.setattr(turns, "LEFT_SECONDS", 0.05)

    async def leave() -> None:
        triton = Triton(stub.grpc_address)
        stub.may_end.clear()
        stub.knows_waiting = False
        pieces = triton.pieces(turn("s", text="What?"))
        assert (await anext(pieces)).text == "W"
        await pieces.aclose()
        await until(lambda: stub.calls_ended >= 1)  # on a busy machine its request's, too
        await triton.close()

    asyncio.run(leave())


def test_a_refused_turn_costs_no_call(stub: StubTriton) -> None:
    async def ask() -> None:
        triton = Triton(stub.grpc_address)
        with pytest.raises(SessionError) as caught:
            await triton.whole(turn("unknown", text="What?"))
        assert caught.value.code is ErrorCode.NOT_FOUND
        assert (await triton.whole(turn("s", text="And?"))).text == "And?"
        assert stub.calls_ended == 0
        await triton.close()

    asyncio.run(ask())


def test_which_turns_go_past_the_ensemble(
    stub: StubTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without pictures that overtake none of their session, and few at a time."""
    monkeypatch.setattr(turns, "MOST_UNHEARD", 2)
    past, through = "language_model", "llava_stream"

    async def ask() -> None:
        triton = Triton(stub.grpc_address)

        def send(session: str, **message: Any) -> asyncio.Task[Delta]:
            tensors = message.pop("tensors", {})
            asked = turn(session, text="?", **message)
            asked = replace(asked, tensors=asked.tensors | tensors)
            return asyncio.create_task(triton.whole(asked))

        async def models(*answers: asyncio.Task[Delta]) -> list[str]:
            """Of these turns, in the order in which they came."""
            await until(lambda: len(stub.seen) == len(answers))
            stub.may_answer.set()
            await asyncio.gather(*answers)
            told = [seen.model for seen in stub.seen]
            stub.seen.clear()
            stub.may_answer.clear()
            return told

        async def one_by_one(*messages: tuple[str, dict[str, Any]]) -> list[str]:
            answers = []
            for session, message in messages:
                answers.append(send(session, **message))
                await until(lambda: len(stub.seen) == len(answers))
            return await models(*answers)

        stub.may_answer.clear()
        picture = {"images": [b"picture"]}
        video = {"tensors": {"video": packed([b"video"])}}
        assert await one_by_one(("s", {}), ("s", picture), ("s", {})) == [past, through, through]
        assert await one_by_one(("s", picture), ("other", {})) == [through, past]
        assert await one_by_one(("s", video), ("other", {})) == [through, past]
        assert await one_by_one(("s", {}), ("s", {}), ("other", {})) == [past, past, through]
        assert await one_by_one(("s", {})) == [past]  # nothing is left of all that
        stub.may_answer.set()
        with pytest.raises(SessionError):
            await triton.whole(turn("unknown", text="?", images=[b"picture"]))
        stub.seen.clear()
        stub.may_answer.clear()
        assert await one_by_one(("s", {}), ("other", {})) == [past, past]
        await triton.close()

    asyncio.run(ask())
