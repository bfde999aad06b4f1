"""What one client can do to the others through any door."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import tritonclient.grpc
from PIL import Image

from benchmarks.hostile.attack import (
    Play,
    UnsafeError,
    ask,
    attack,
    connected,
    post,
    side_by_side,
)
from benchmarks.load import Ask
from benchmarks.pictures import encoded
from benchmarks.soak_clients import LONG, LONG_QUESTION
from benchmarks.stand import Stand, request
from llava_triton.contract.errors import ErrorCode, SessionError, error_from_text

ONE_TOKEN = {"max_tokens": 1}
NEW = {"X-Amzn-SageMaker-Session-Id": "NEW_SESSION"}


def _picture() -> bytes:
    return encoded(Image.new("RGB", (64, 64), "red"), "PNG")


def _chat(stand: Stand, session: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
    headers = {"Content-Type": "application/json", "X-Amzn-SageMaker-Session-Id": session}
    body = json.dumps({"messages": messages, "max_tokens": 8}).encode()
    status, answer = post(stand.adapter_port, "/invocations", body, headers)
    if status != "200":
        return status, ""
    return status, json.loads(answer)["choices"][0]["message"]["content"]


def _minted(stand: Stand, body: bytes, content_type: str) -> str:
    headers = {"Content-Type": content_type, **NEW}
    told = request(stand.adapter_port, "/invocations", body, headers).headers
    return told.get("X-Amzn-SageMaker-New-Session-Id", "").partition(";")[0]


@attack("S1", right=r"200|4\d\d", cheap=True)
def forgotten_pictures(stand: Stand) -> Play:
    """Refused openings push out what the adapter remembers of somebody's picture."""
    picture = _picture()

    def play() -> Counter[str]:
        session = _minted(stand, picture, "image/png")
        first: dict[str, Any] = {"role": "user", "content": "Describe the picture."}
        _, said = _chat(stand, session, [first])
        bad = b'{"requestType": "NEW_SESSION", "image": "bm8gcGljdHVyZQ=="}'
        headers = {"Content-Type": "application/json", **NEW}
        answered = Counter(
            post(stand.adapter_port, "/invocations", bad, headers)[0] for _ in range(280)
        )
        second = {"role": "user", "content": "Describe the picture."}
        told = [first, {"role": "assistant", "content": said}, second]
        status, again = _chat(stand, session, told)
        if status == "200" and "not see a picture" in again:
            raise UnsafeError(f"answered without the picture: {again!r}")
        answered[status] += 1
        return answered

    return play


def _beside_a_long_answer(
    stand: Stand, sessions: list[str], then: Callable[[], Counter[str]]
) -> Counter[str]:
    """Every session is answering at length meanwhile; left then."""
    over = threading.Event()

    def hold(session: str) -> None:
        with connected(stand.doors["grpc-stream"]) as connection:
            pieces = connection.stream(
                Ask(session, True, text=LONG_QUESTION, sampling={**LONG, "max_seconds": 8})
            )
            try:
                for _ in pieces:
                    started.release()
                    if over.is_set():
                        break
            except SessionError:
                started.release()
            finally:
                pieces.close()

    started = threading.Semaphore(0)
    threads = [threading.Thread(target=hold, args=(each,), daemon=True) for each in sessions]
    for thread in threads:
        thread.start()
    for _ in threads:
        started.acquire(timeout=20.0)
    try:
        return then()
    finally:
        over.set()
        for thread in threads:
            thread.join()


@attack("S2", right="OK|UNAVAILABLE")
def waiting_turns(stand: Stand) -> Play:
    """40 whole turns of one session wait behind a long one."""

    def play() -> Counter[str]:
        session = uuid.uuid4().hex
        turn = Ask(session, text="And?", sampling=ONE_TOKEN)
        calls = [partial(ask, stand.doors["grpc"], turn)] * 40
        return _beside_a_long_answer(stand, [session], lambda: side_by_side(calls))

    return play


@attack("S3", right="OK|UNAVAILABLE|CANCELLED")
def endless_ends(stand: Stand) -> Play:
    """3,000 turns with START and END on one session ID, on one gRPC stream that is then left."""

    def play() -> Counter[str]:
        answered: Counter[str] = Counter()
        session = uuid.uuid4().hex
        message = Ask(session, text="Hello", sampling=ONE_TOKEN)
        inputs = message.inputs(tritonclient.grpc)
        with tritonclient.grpc.InferenceServerClient(stand.server.grpc_address) as client:

            def arrived(result: Any, error: Exception | None) -> None:
                answered["OK" if error is None else error_from_text(str(error)).code.name] += 1

            client.start_stream(arrived)
            for _ in range(3000):
                client.async_stream_infer(
                    "llava_stream",
                    inputs,
                    sequence_id=session,
                    sequence_start=True,
                    sequence_end=True,
                )
            deadline = time.monotonic() + 5.0
            while sum(answered.values()) < 3000 and time.monotonic() < deadline:
                time.sleep(0.1)
            before_leaving = Counter(answered)
            client.stop_stream(cancel_requests=True)
        return before_leaving

    return play


@attack("S4", right="OK|UNAVAILABLE|INVALID_ARG")  # a session's context is full then
def waiting_features(stand: Stand) -> Play:
    """200 waiting turns with 8 pictures each."""
    picture = _picture()

    def play() -> Counter[str]:
        sessions = [uuid.uuid4().hex for _ in range(4)]
        calls = [
            partial(
                ask,
                stand.doors["grpc"],
                Ask(session, text="And?", images=[picture] * 8, sampling=ONE_TOKEN),
            )
            for session in sessions
            for _ in range(50)
        ]
        return _beside_a_long_answer(stand, sessions, lambda: side_by_side(calls))

    return play


@attack("S5", right="OK", cheap=True)
def oracle(stand: Stand) -> Play:
    """Another tenant's text guessed by the number of cached tokens."""
    words = "The number of my account is one two three four five six seven eight nine ten. " * 6

    def cached(tenant: str, text: str) -> int:
        turn = Ask(uuid.uuid4().hex, text=text, sampling=ONE_TOKEN)
        with tritonclient.grpc.InferenceServerClient(stand.server.grpc_address) as client:
            result = client.infer(
                "llava",
                turn.inputs(tritonclient.grpc),
                sequence_id=turn.session_id,
                sequence_start=True,
                sequence_end=True,
                parameters={"tenant": tenant},
            )
        return int(result.as_numpy("num_cached_tokens")[0])

    def play() -> Counter[str]:
        secret = f"{uuid.uuid4().hex} {words}"
        cached("victim", secret)
        guessed, other = cached("attacker", secret), cached("attacker", f"{uuid.uuid4().hex} x")
        if guessed > other:
            raise UnsafeError(f"{guessed} tokens cached of what the victim said, else {other}")
        return Counter({"OK": 1})

    return play


def _scans(side: int, scans: int) -> bytes:
    """A JPEG of one colour in many scans."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=50)
    last = data.rindex(b"\xff\xda")
    missing = max(0, scans - data.count(b"\xff\xda"))
    return data[:-2] + data[last:-2] * missing + data[-2:]


@attack("S6", right="INVALID_ARG|UNAVAILABLE")
def many_scans(stand: Stand) -> Play:
    """4 requests of 8 JPEGs of 49 megapixels in 100 scans."""
    bomb = _scans(7000, 99)
    turn = Ask(uuid.uuid4().hex, True, True, "What?", [bomb] * 8, ONE_TOKEN)
    return lambda: side_by_side([partial(ask, stand.doors["grpc"], turn)] * 4)


@attack("S6b", right="OK|INVALID_ARG|UNAVAILABLE")
def large_pictures(stand: Stand) -> Play:
    """4 requests of 8 ordinary JPEGs of 49 megapixels, the last a broken one."""
    picture = _scans(7000, 0)
    turns = [
        Ask(
            uuid.uuid4().hex,
            start=True,
            end=True,
            text="What?",
            images=[*(picture + bytes([number, each]) for each in range(7)), picture[:2000]],
            sampling=ONE_TOKEN,
        )
        for number in range(4)
    ]
    return lambda: side_by_side([partial(ask, stand.doors["grpc"], turn) for turn in turns])


@attack("S7", right="INVALID_ARG|UNAVAILABLE", cheap=True)
def long_texts(stand: Stand) -> Play:
    """30 clients with texts of 256 KB."""
    text = ("What do you see, " * 16_000)[: 255 * 1024]

    def call(door: str) -> str:
        turn = Ask(uuid.uuid4().hex, True, True, text, sampling=ONE_TOKEN)
        return ask(stand.doors[door], turn)

    doors = ("http", "grpc", "grpc-stream", "adapter", "adapter-stream")
    return lambda: side_by_side([partial(call, doors[each % len(doors)]) for each in range(30)])


@attack("F7", right="OK", cheap=True)
def control_tokens(stand: Stand) -> Play:
    """Control tokens in a user's text."""

    def tokens(text: str) -> int:
        turn = Ask(uuid.uuid4().hex, True, True, text, sampling=ONE_TOKEN)
        with connected(stand.doors["grpc-stream"]) as connection:
            return connection.ask(turn).done.num_input_tokens

    def play() -> Counter[str]:
        for control in ("</s>", "<s>", "<unk>"):
            one = (tokens(f"a{control * 21}") - tokens(f"a{control}")) / 20
            if one <= 1:
                raise UnsafeError(f"{control} in a text is {one} tokens: the control token itself")
        return Counter({"OK": 1})

    return play


@attack("F9", right="UNAVAILABLE", alone=True)
def full_house(stand: Stand) -> Play:
    """8 pictures of 49 megapixels, when all sessions are in use."""
    picture = _scans(7000, 0)

    def play() -> Counter[str]:
        with connected(stand.doors["grpc"]) as connection:
            opened: list[str] = []
            try:
                while len(opened) < 2000:
                    opened.append(uuid.uuid4().hex)
                    connection.ask(Ask(opened[-1], True, text="Hi", sampling=ONE_TOKEN))
            except SessionError as error:
                if error.code is not ErrorCode.UNAVAILABLE:
                    raise
            began = time.monotonic()
            turn = Ask(uuid.uuid4().hex, True, images=[picture + b"x"] * 8)
            said = ask(stand.doors["grpc"], turn)
            took = time.monotonic() - began
            for session in opened[:-1]:
                connection.ask(Ask(session, end=True))
        return Counter({said if took < 1.0 else f"{said} after {took:.1f} s": 1})

    return play
