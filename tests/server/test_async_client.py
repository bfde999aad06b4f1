"""`AsyncSession` on the real server: what `Session` does, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_triton.client import AsyncSession, ErrorCode, PastTurn, Session, SessionError
from llava_triton.client.async_transport import ThreadedTransport
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.opening import Address, opening_turn
from llava_triton.client.transport import LostConnectionError
from llava_triton.server.triton_server import TritonServer, free_ports

PICTURE = sorted((Path(__file__).parents[2] / "examples" / "pictures").iterdir())[0]
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "Is there a red circle?")
WITHIN_SECONDS = 20.0


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return server.grpc_url if request.param == "grpc" else server.http_url


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> list[str]:
    with Session.open(server.grpc_url, image=PICTURE) as session:
        return [session.ask(question).text for question in QUESTIONS]


def test_a_conversation(url: str, expected: list[str]) -> None:
    async def talk() -> list[str]:
        async with await AsyncSession.open(url) as session:
            shown = await session.add_image(PICTURE)
            assert shown.finish_reason == "prefilled"
            answers = [await session.ask(question) for question in QUESTIONS]
            assert answers[2].num_cached_tokens >= answers[1].num_input_tokens
            return [answer.text for answer in answers]

    assert asyncio.run(talk()) == expected


def test_many_at_once_on_one_thread(server: TritonServer, expected: list[str]) -> None:
    async def talk() -> list[str]:
        async with await AsyncSession.open(server.grpc_url, image=PICTURE) as session:
            texts = []
            for question in QUESTIONS:
                stream = session.stream(question)
                texts.append("".join([piece async for piece in stream]))
                assert stream.answer.text == texts[-1]
                assert 0 < stream.answer.first_token_seconds <= stream.answer.seconds
            return texts

    async def crowd() -> list[list[str]]:
        return await asyncio.gather(*(talk() for _ in range(8)))

    assert asyncio.run(crowd()) == [expected] * 8


def test_sessions_go_back_and_fork(url: str, expected: list[str]) -> None:
    async def talk() -> None:
        async with await AsyncSession.open(url, image=PICTURE) as session:
            for question in QUESTIONS[:2]:
                last = await session.ask(question)
            again = await session.regenerate()
            assert (again.text, again.num_computed_tokens) == (expected[1], 1)
            async with await session.fork() as other:
                await session.rewind(1)
                assert (await session.ask(QUESTIONS[1])).text == expected[1]
                third = await other.ask(QUESTIONS[2])
                assert third.text == expected[2]
                assert third.num_cached_tokens >= last.num_input_tokens

    asyncio.run(talk())


def test_an_answer_is_stopped_and_kept(server: TritonServer) -> None:
    async def talk() -> None:
        async with await AsyncSession.open(server.grpc_url, image=PICTURE) as session:
            stream = session.stream(QUESTIONS[1], max_tokens=900, ignore_eos=True)
            said = ""
            async for piece in stream:
                said += piece
                await stream.stop()
            assert (stream.answer.finish_reason, stream.answer.text) == ("stopped", said)
            more = await session.ask(QUESTIONS[2])
            assert more.num_cached_tokens >= stream.answer.num_input_tokens
            early = session.stream_again(max_tokens=900, ignore_eos=True)
            await early.stop()  # before it has begun
            async for _ in early:
                pass
            assert early.answer.finish_reason == "stopped"

    asyncio.run(talk())


@pytest.mark.parametrize("how", ["aclose", "the next turn", "the task's end"])
def test_leaving_a_stream_cancels_its_turn(
    server: TritonServer, expected: list[str], how: str
) -> None:
    endless: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}

    async def read(session: AsyncSession, begun: asyncio.Event) -> None:
        async for _ in session.stream(QUESTIONS[1], **endless):
            begun.set()

    async def talk() -> str:
        async with await AsyncSession.open(server.grpc_url, image=PICTURE) as session:
            if how == "the task's end":
                begun = asyncio.Event()
                reading = asyncio.create_task(read(session, begun))
                await begun.wait()
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            else:
                stream = session.stream(QUESTIONS[1], **endless)
                async for _ in stream:
                    break
                if how == "aclose":
                    await stream.aclose()
                with pytest.raises(RuntimeError, match="has not ended"):
                    _ = stream.answer
            return (await session.ask(QUESTIONS[0])).text

    async def in_time() -> str:
        return await asyncio.wait_for(talk(), WITHIN_SECONDS)

    assert asyncio.run(in_time()) == expected[0]


@pytest.mark.parametrize("how", ["ask", "stream"])
@pytest.mark.parametrize("steps", [1, 3, 5, 9])
def test_a_task_that_is_cancelled_early_does_not_cost_the_session(
    server: TritonServer, how: str, steps: int
) -> None:
    """Where Triton has not handed a turn on yet, cancelling it would end its session."""

    async def read(session: AsyncSession) -> None:
        if how == "ask":
            await session.ask(QUESTIONS[1], max_tokens=50, ignore_eos=True)
        async for _ in session.stream(QUESTIONS[1], max_tokens=50, ignore_eos=True):
            pass

    async def talk() -> None:
        async with await AsyncSession.open(server.grpc_url, image=PICTURE) as session:
            task = asyncio.create_task(read(session))
            for _ in range(steps):
                await asyncio.sleep(0)  # lets the event loop go on, and waits for nothing
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await session.ask(QUESTIONS[2], max_tokens=5)).num_output_tokens > 0

    asyncio.run(talk())


def test_errors_are_the_same(url: str, server: TritonServer) -> None:
    async def talk() -> None:
        async with await AsyncSession.open(url, image=PICTURE) as session:
            with pytest.raises(SessionError, match="temperature is 9") as caught:
                await session.ask("And now?", temperature=9)
            assert caught.value.code is ErrorCode.INVALID_ARG
            with pytest.raises(SessionError) as caught:
                async for _ in session.stream("And now?", temperature=9):
                    pass
            over_http = url == server.http_url
            assert ("stream" if over_http else "temperature is 9") in caught.value.sentence
            assert (await session.ask(QUESTIONS[1], max_tokens=3)).num_output_tokens == 3

    asyncio.run(talk())


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_server_there(scheme: str) -> None:
    (port,) = free_ports(1)
    with pytest.raises(LostConnectionError, match=f"no server answers at localhost:{port}"):
        asyncio.run(AsyncSession.open(f"{scheme}://localhost:{port}"))


def test_an_earlier_conversation_opens_a_session(url: str, expected: list[str]) -> None:
    past = [PastTurn(QUESTIONS[0], expected[0], 1), PastTurn(QUESTIONS[1], expected[1])]

    async def talk() -> str:
        async with await AsyncSession.open(url, image=PICTURE, history=past) as session:
            answer = await session.ask(QUESTIONS[2])
            assert answer.num_cached_tokens > answer.num_computed_tokens
            return answer.text

    assert asyncio.run(talk()) == expected[2]
    with Session.open(url, image=PICTURE, history=past) as session:
        assert session.ask(QUESTIONS[2]).text == expected[2]


@pytest.fixture
def threaded(server: TritonServer) -> Iterator[GrpcTransport]:
    transport = GrpcTransport(server.grpc_address)
    yield transport
    transport.close()


def test_other_transports_wait_on_threads(threaded: GrpcTransport, expected: list[str]) -> None:
    """What sagemaker:// does; its own way to a server is tested with SageMaker's client."""
    opening = opening_turn(Address("grpc", "", {}), PICTURE, None, ())

    async def talk() -> str:
        transport = ThreadedTransport(threaded)
        opened, _ = await transport.open(opening)
        session = AsyncSession(transport, opened)
        stream = session.stream(QUESTIONS[1], max_tokens=500, ignore_eos=True)
        async for _ in stream:
            break
        text = "".join([piece async for piece in session.stream(QUESTIONS[0])])
        await session.close()
        return text

    assert asyncio.run(talk()) == expected[0]
