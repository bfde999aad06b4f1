"""How the adapter sends turns to Triton, and leaves them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from llava_sagemaker.adapter.turns import Triton, turn

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
    """Triton ends the sequence where a cancelled turn of it waits. An opening has none to lose."""

    async def leave() -> None:
        triton = Triton(stub.grpc_address)
        stub.may_answer.clear()
        waiting = asyncio.create_task(triton.whole(turn("s", text="What?", start=opens)))
        await until(lambda: len(stub.seen) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if not opens:
            # What is sent behind it comes behind it: a cancellation would have come, too.
            other = asyncio.create_task(triton.whole(turn("other", text="And?")))
            await until(lambda: len(stub.seen) == 2)
            assert stub.calls_ended == 0
            stub.may_answer.set()
            assert (await other).text == "And?"
        await until(lambda: stub.calls_ended == 1)
        stub.may_answer.set()
        assert (await triton.whole(turn("s", text="Still there?"))).text == "Still there?"
        await triton.close()

    asyncio.run(leave())


def test_a_turn_that_is_left_in_its_middle_is_cancelled_at_once(stub: StubTriton) -> None:
    async def leave() -> None:
        triton = Triton(stub.grpc_address)
        pieces = triton.pieces(turn("s", text="What?"))
        assert (await anext(pieces)).text == "W"
        await pieces.aclose()
        await until(lambda: stub.calls_ended == 1)
        await triton.close()

    asyncio.run(leave())
