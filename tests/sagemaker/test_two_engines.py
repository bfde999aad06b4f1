"""The container with two engines, each a real Triton: as on a machine with two GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from llava_triton.client import Session
from llava_triton.server.triton_server import TritonServer
from tests.adapter_process import number_on
from tests.conftest import ROOT
from tests.container_process import Answer, Container, question, text_of

PICTURES = [
    (ROOT / "examples" / "pictures" / name).read_bytes() for name in ("five-shapes.png", "wide.jpg")
]
QUESTIONS = ("How many shapes are there?", "Describe the picture.", "Is there a circle?")
LONG = {"max_tokens": 400, "ignore_eos": True}
SESSIONS = 6


class TwoEngines(Container):
    """One whose entry point was told to start two."""

    def __init__(self, model: Path, log: Path) -> None:
        super().__init__(model, log, before=["env", "LLAVA_ENGINES=2"])

    def metric(self, name: str) -> float:
        return number_on(self.request("GET", "/metrics").body.decode(), name)

    def sessions(self) -> list[float]:
        """Open sessions of each engine."""
        return [
            sum(
                self.metric(f'llava_sessions{{state="{state}",engine="{engine}"}}')
                for state in ("active", "idle")
            )
            for engine in range(2)
        ]

    def triton(self, engine: int) -> psutil.Process:
        """An engine's tritonserver."""
        ports = self.engine_ports()
        guards = self.descendants("server_guard")
        (found,) = (
            each for each in self.descendants(f"--grpc-port={ports[engine]}") if each not in guards
        )
        return found

    def engine_ports(self) -> list[int]:
        """gRPC's, in the engines' order."""
        (adapter,) = self.descendants("llava_sagemaker.adapter")
        arguments = adapter.cmdline()
        first = arguments.index("--triton") + 1
        return [int(each.rpartition(":")[2]) for each in arguments[first : first + 2]]

    def model(self, engine: int, name: str) -> psutil.Process:
        """The process of an engine's model."""
        (found,) = (
            each
            for each in self.triton(engine).children(recursive=True)
            if f"/{name}/" in " ".join(each.cmdline())
        )
        return found

    def open(self, picture: bytes) -> str:
        opened = self.invoke(picture, "NEW_SESSION", "image/png")
        assert opened.status == 200, opened.body
        return opened.new_session

    def engines_up(self) -> int:
        return int(self.metric("llava_adapter_engine_up"))


@pytest.fixture(scope="module")
def container(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoEngines]:
    container = TwoEngines(demo_repository, tmp_path_factory.mktemp("two engines") / "log")
    try:
        container.wait_until_ready()
        container.wait_until(lambda: container.engines_up() == 2, "both engines")
        yield container
    finally:
        container.stop()


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> dict[bytes, list[str]]:
    """Answers of one engine."""
    answers = {}
    for picture in PICTURES:
        with Session.open(server.grpc_url, image=picture) as session:
            answers[picture] = [session.ask(text).text for text in QUESTIONS]
    return answers


def test_all_answers_are_those_of_one_engine(
    container: TwoEngines, expected: dict[bytes, list[str]]
) -> None:
    def hold(number: int) -> tuple[str, list[str]]:
        picture = PICTURES[number % len(PICTURES)]
        session = container.open(picture)
        return session, [text_of(container.invoke(question(t), session)) for t in QUESTIONS]

    before = container.sessions()
    with ThreadPoolExecutor(SESSIONS) as pool:
        held = list(pool.map(hold, range(SESSIONS)))
    for number, (_, answers) in enumerate(held):
        assert answers == expected[PICTURES[number % len(PICTURES)]]
    container.wait_until(lambda: sum(container.sessions()) == sum(before) + SESSIONS, "the numbers")
    first, second = container.sessions()
    assert abs(first - second) <= 1
    # Plain Triton clients speak to one of them.
    for port in container.engine_ports():
        with Session.open(f"grpc://127.0.0.1:{port}", image=PICTURES[0]) as session:
            assert session.ask(QUESTIONS[0]).text == expected[PICTURES[0]][0]
    for session_id, _ in held:
        assert container.invoke({"requestType": "CLOSE"}, session_id).status == 200
    container.wait_until(lambda: sum(container.sessions()) == sum(before), "the end of all")


def test_the_death_of_one_disturbs_no_stream_of_the_other(
    container: TwoEngines, expected: dict[bytes, list[str]]
) -> None:
    sessions = [container.open(PICTURES[0]) for _ in range(4)]
    long = question("Describe the picture.", **LONG)
    quiet = text_of(container.invoke(long))  # opens no session, and shows no picture
    with ThreadPoolExecutor(4) as pool:
        streams = [container.events(long, session) for session in sessions]
        first = [next(stream) for stream in streams]
        container.model(0, "language_model").kill()

        def rest(stream: Iterator[dict[str, object]]) -> list[dict[str, object]]:
            return list(stream)

        others = list(pool.map(rest, streams))
        assert container.ping() == 200
    assert quiet
    ended = [pieces[-1].get("finish_reason") for pieces in others]
    assert sorted(map(str, ended)) == ["None", "None", "length", "length"]
    whole = {
        str(begun["text_output"]) + "".join(str(piece["text_output"]) for piece in pieces)
        for begun, pieces in zip(first, others, strict=True)
        if pieces[-1].get("finish_reason") == "length"
    }
    assert len(whole) == 1  # the same answer, undisturbed
    # Of the model's process, or of Triton itself, which may not survive that.
    container.wait_until(
        lambda: bool(re.search("engine 0: the .* starting Triton again", container.output)),
        "its supervisor's word",
    )
    after = [container.invoke(question(QUESTIONS[0]), session) for session in sessions]
    assert sorted(answer.status for answer in after) == [200, 200, 400, 400]
    lost = [session for session, answer in zip(sessions, after, strict=True) if _is_lost(answer)]
    kept = [session for session in sessions if session not in lost]
    assert container.ping() == 200
    container.wait_until(lambda: container.engines_up() == 2, "the engine again")
    for session in kept:
        assert container.invoke({"requestType": "CLOSE"}, session).status == 200
    session = container.open(PICTURES[0])
    assert [text_of(container.invoke(question(t), session)) for t in QUESTIONS] == expected[
        PICTURES[0]
    ]


def _is_lost(answer: Answer) -> bool:
    return answer.status == 400 and answer.code == "session_not_found"


def test_sessions_outlive_their_adapter(container: TwoEngines) -> None:
    sessions = [container.open(PICTURES[0]) for _ in range(2)]
    for session in sessions:
        text_of(container.invoke(question(QUESTIONS[0]), session))
    container.kill("llava_sagemaker.adapter")
    container.wait_until(lambda: container.ping() == 0, "its end")
    container.wait_until_ready()
    for session in sessions:
        answer = container.invoke(question(QUESTIONS[1]), session)
        assert text_of(answer)
        outputs = {each["name"]: each["data"] for each in answer.json["outputs"]}
        assert outputs["num_cached_tokens"][0] > outputs["num_input_tokens"][0] / 2
