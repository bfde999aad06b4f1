"""Streams that the Python client leaves early: the turn is cancelled, the call is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from llava_triton.client.async_grpc import AsyncGrpcTransport
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.transport import TurnMessage
from llava_triton.contract.errors import ErrorCode, SessionError
from tests.stub_triton import StubTriton

PATIENCE_SECONDS = 20.0
TURN = TurnMessage("s", text="What?")
AGAIN = TurnMessage("s", text="And?")


@pytest.fixture
def stub() -> Iterator[StubTriton]:
    stub = StubTriton()
    stub.open.add("s")
    yield stub
    stub.stop()


def test_a_stream_that_is_left(stub: StubTriton) -> None:
    transport = GrpcTransport(stub.grpc_address)
    stub.may_end.clear()
    pieces = transport.stream(TURN)
    assert next(pieces).text == "W"
    pieces.close()
    assert [session for session, _ in stub.cancelled] == ["s"]
    stub.may_end.set()
    assert "".join(piece.text for piece in transport.stream(AGAIN)) == "And?"
    assert stub.calls_ended == 0
    transport.close()


def test_a_stream_goes_on_after_a_refused_turn(stub: StubTriton) -> None:
    transport = GrpcTransport(stub.grpc_address)
    with pytest.raises(SessionError) as caught:
        list(transport.stream(TurnMessage("unknown", text="What?")))
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert "".join(piece.text for piece in transport.stream(AGAIN)) == "And?"
    assert stub.calls_ended == 0
    transport.close()


@pytest.mark.parametrize("how", ["aclose", "cancel before it begins", "cancel"])
def test_an_asynchronous_stream_that_is_left(stub: StubTriton, how: str) -> None:
    async def leave() -> None:
        transport = AsyncGrpcTransport(stub.grpc_address)
        stub.may_end.clear()
        if how == "cancel before it begins":
            stub.may_answer.clear()
        stream = transport.stream(TURN)
        if how == "aclose":
            assert (await anext(stream)).text == "W"
            await stream.aclose()
        else:
            begun = asyncio.Event()

            async def read() -> None:
                async for _ in stream:
                    begun.set()

            reading = asyncio.create_task(read())
            if how == "cancel":
                await begun.wait()
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not stub.seen:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await stream.aclose()
        assert [session for session, _ in stub.cancelled] == ["s"]
        stub.may_answer.set()
        stub.may_end.set()
        assert "".join([piece.text async for piece in transport.stream(AGAIN)]) == "And?"
        assert stub.calls_ended == 0
        await transport.close()

    asyncio.run(leave())
