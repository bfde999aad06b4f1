"""The numbers on the metrics port after a series of turns, one by one."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from llava_triton.contract.errors import ErrorCode, error_from_text
from llava_triton.contract.settings import FILE_NAME, Settings
from llava_triton.engine.statistics import BETWEEN_TOKENS_BOUNDS, FIRST_TOKEN_BOUNDS, Histogram
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.server.triton_server import TritonServer, free_ports
from llava_triton.serving.metrics import _histogram
from tests.triton import Answer, Stream, whole

PICTURES = sorted((Path(__file__).resolve().parents[2] / "examples" / "pictures").glob("*.*"))
PUBLISHED_SECONDS = 30.0
"""Numbers are half a second old at the most; this much more for a busy machine."""
POLL_SECONDS = 0.05
MAX_SESSIONS = 2
BLOCKS = 1000
CONTEXT_LENGTH = 16 * BLOCKS
"""Longer than the checkpoint's own: an answer must last until its turn is seen on the port."""

Metrics = dict[str, float]
"""By name and labels, as they are written."""


@pytest.fixture(scope="module")
def small_server(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server of its own, so that nobody else's turns are counted."""
    repository = tmp_path_factory.mktemp("small") / "repository"
    shutil.copytree(demo_repository, repository)
    block_bytes = 65_536  # of the demo checkpoint
    limits = Settings(
        max_sessions=MAX_SESSIONS,
        kv_cache_bytes=BLOCKS * block_bytes,
        host_cache_bytes=1 << 24,
        image_features_bytes=1 << 24,
    )
    (repository / FILE_NAME).write_text(limits.to_json())
    config = repository / "language_model" / "1" / "checkpoint" / "config.json"
    values = json.loads(config.read_text())
    values["text_config"]["max_position_embeddings"] = CONTEXT_LENGTH
    config.write_text(json.dumps(values))
    with TritonServer(repository, *free_ports(3)) as server:
        yield server


@pytest.fixture
def stream(small_server: TritonServer) -> Iterator[Stream]:
    with Stream(small_server.grpc_address) as stream:
        yield stream


@pytest.fixture
def new_session(stream: Stream) -> Iterator[Callable[[], str]]:
    """Names sessions, and closes those that a failed test leaves open."""
    names: list[str] = []

    def make() -> str:
        names.append(uuid.uuid4().hex)
        return names[-1]

    yield make
    for name in names:
        with suppress(InferenceServerException):
            whole(stream.turn(session=name, end=True))


def read(server: TritonServer) -> Metrics:
    """Every number of ours on the metrics port."""
    with urllib.request.urlopen(server.metrics_url, timeout=10.0) as response:
        text = response.read().decode()
    lines = re.findall(r"^(llava_\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)
    assert len(dict(lines)) == len(lines), "a number is published twice"
    return {name: float(value) for name, value in lines}


def wait_until(server: TritonServer, condition: Callable[[Metrics], object]) -> Metrics:
    deadline = time.monotonic() + PUBLISHED_SECONDS
    while not condition(now := read(server)):
        assert time.monotonic() < deadline, f"still {now}"
        time.sleep(POLL_SECONDS)
    return now


def wait_for(server: TritonServer, expected: Metrics) -> Metrics:
    """The numbers when those expected are there; what still differs otherwise."""
    deadline = time.monotonic() + PUBLISHED_SECONDS
    while True:
        now = read(server)
        wrong = {
            name: (now.get(name), value)
            for name, value in expected.items()
            if now.get(name) != value
        }
        if not wrong:
            return now
        assert time.monotonic() < deadline, f"found, expected: {wrong}"
        time.sleep(POLL_SECONDS)


def refused(stream: Stream, **turn: object) -> ErrorCode:
    with pytest.raises(InferenceServerException) as caught:
        whole(stream.turn(**turn))  # type: ignore[arg-type]
    return error_from_text(str(caught.value)).code


def check_histogram(
    now: Metrics, before: Metrics, name: str, bounds: Sequence[float], count: int
) -> None:
    """A histogram has `count` observations more than before, in buckets that add up."""

    def buckets(metrics: Metrics) -> list[float]:
        limits = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        return [metrics[f'{name}_bucket{{le="{limit}"}}'] for limit in limits]

    counts = buckets(now)
    assert counts == sorted(counts)
    assert counts[-1] == now[f"{name}_count"]
    assert counts[-1] - buckets(before)[-1] == count
    passed = now[f"{name}_sum"] - before[f"{name}_sum"]
    assert 0.0 < passed < PUBLISHED_SECONDS
    assert len([key for key in now if key.startswith(f"{name}_bucket")]) == len(counts)


def test_a_series_of_turns(
    small_server: TritonServer, stream: Stream, new_session: Callable[[], str]
) -> None:
    server = small_server
    first = "llava_time_to_first_token_seconds"
    between = "llava_time_between_tokens_seconds"  # the last to be published
    start = wait_until(server, lambda now: f"{between}_count" in now)
    assert {name: value for name, value in start.items() if value} == {
        'llava_kv_blocks{state="free"}': BLOCKS
    }
    picture, other = (path.read_bytes() for path in PICTURES[:2])
    one, two, third = new_session(), new_session(), new_session()
    limit = {"max_tokens": 7}

    def ask(text: str | None = None, **turn: object) -> Answer:
        return whole(stream.turn(text, **turn))

    answers = [
        ask(session=one, images=[picture], start=True),
        ask("Describe the picture.", session=one, parameters=limit),
        ask("How many shapes are there?", session=two, images=[picture], start=True),
        ask("And in this one?", session=two, images=[other, picture], parameters=limit),
        ask("Thank you!", session=one),
    ]
    assert refused(stream, text="Hello!", session=third, start=True) is ErrorCode.UNAVAILABLE
    assert refused(stream, session=one) is ErrorCode.INVALID_ARG
    assert refused(stream, text="long " * CONTEXT_LENGTH, session=two) is ErrorCode.INVALID_ARG
    cached = sum(answer.num_cached_tokens for answer in answers)
    spoken = [answer for answer in answers if answer.num_output_tokens]
    # The token that ends an answer is one, too, though it is not shown.
    tokens = sum(answer.num_output_tokens + (answer.finish_reason == "stop") for answer in spoken)
    shared = answers[2].num_cached_tokens // BLOCK_TOKENS
    assert shared > 0
    now = wait_for(
        server,
        {
            'llava_turns_total{outcome="completed"}': len(answers),
            'llava_turns_total{outcome="refused"}': 3,
            'llava_turns_total{outcome="failed"}': 0,
            'llava_turns_total{outcome="cancelled"}': 0,
            'llava_sessions{state="idle"}': 2,
            'llava_sessions{state="active"}': 0,
            "llava_turns_in_flight": 0,
            "llava_sessions_opened_total": 2,
            "llava_sessions_closed_total": 0,
            "llava_sessions_expired_total": 0,
            'llava_prompt_tokens_total{source="reused"}': cached,
            'llava_prompt_tokens_total{source="computed"}': sum(
                answer.num_input_tokens for answer in answers
            )
            - cached,
            "llava_generation_tokens_total": sum(answer.num_output_tokens for answer in answers),
            "llava_prefix_cache_hit_blocks_total": shared,
            "llava_kv_blocks_shared": shared,
            "llava_kv_blocks_copied_total": 0,
            'llava_kv_evictions_total{tier="host"}': 0,
            'llava_kv_evictions_total{tier="dropped"}': 0,
            'llava_kv_restores_total{tier="host"}': 0,
            'llava_kv_restores_total{tier="dropped"}': 0,
            "llava_kv_host_bytes": 0,
            "llava_images": 2,
            "llava_image_evictions_total": 0,
            "llava_image_features_hits_total": 2,
            'llava_image_cache_total{result="miss"}': 2,
            'llava_image_cache_total{result="hit"}': 2,
            f"{first}_count": len(spoken),
            f"{between}_count": tokens - len(spoken),
        },
    )
    used = now['llava_kv_blocks{state="used"}']
    assert used + now['llava_kv_blocks{state="free"}'] == BLOCKS
    ends = [answers[position] for position in (4, 3)]
    filled = sum(answer.num_input_tokens + answer.num_output_tokens for answer in ends)
    assert used == pytest.approx(filled / BLOCK_TOKENS - shared, abs=2)
    check_histogram(now, start, first, FIRST_TOKEN_BOUNDS, len(spoken))
    check_histogram(now, start, between, BETWEEN_TOKENS_BOUNDS, tokens - len(spoken))
    waited = sum(answer.first_token_ms for answer in spoken) / 1000.0
    assert now[f"{first}_sum"] == pytest.approx(waited, rel=1e-3)

    # One turn in flight, and then broken off.
    with Stream(server.grpc_address) as leaving:
        endless = {"max_tokens": CONTEXT_LENGTH, "ignore_eos": True}
        next(leaving.turn("Go on.", session=one, parameters=endless))
        wait_for(
            server,
            {
                'llava_sessions{state="active"}': 1,
                'llava_sessions{state="idle"}': 1,
                "llava_turns_in_flight": 1,
            },
        )
        leaving.cancel()
        wait_for(
            server,
            {
                'llava_turns_total{outcome="cancelled"}': 1,
                'llava_turns_total{outcome="completed"}': len(answers),
                'llava_sessions{state="active"}': 0,
                "llava_turns_in_flight": 0,
                "llava_kv_blocks_shared": shared,
            },
        )

    # The end of both: nothing is held.
    last = ask("Bye!", session=one, end=True)
    assert ask(session=two, end=True).finish_reason == "closed"
    answers.append(last)
    cached += last.num_cached_tokens
    end = wait_for(
        server,
        {
            'llava_turns_total{outcome="completed"}': len(answers) + 1,
            'llava_turns_total{outcome="refused"}': 3,
            'llava_sessions{state="idle"}': 0,
            'llava_sessions{state="active"}': 0,
            "llava_sessions_opened_total": 2,
            "llava_sessions_closed_total": 2,
            'llava_prompt_tokens_total{source="reused"}': cached,
            'llava_prompt_tokens_total{source="computed"}': sum(
                answer.num_input_tokens for answer in answers
            )
            - cached,
            "llava_generation_tokens_total": sum(answer.num_output_tokens for answer in answers),
            'llava_kv_blocks{state="used"}': 0,
            'llava_kv_blocks{state="free"}': BLOCKS,
            "llava_kv_blocks_shared": 0,
            "llava_images": 0,
        },
    )
    # What only grows has only grown.
    gauges = ("llava_sessions{", "llava_kv_blocks{", "llava_images", "llava_turns_in", "llava_kv_b")
    assert all(end[name] >= now[name] for name in now if not name.startswith(gauges))


def test_a_session_too_many_is_refused_until_one_ends(
    stream: Stream, new_session: Callable[[], str]
) -> None:
    sessions = [new_session() for _ in range(MAX_SESSIONS + 1)]
    for session in sessions[:-1]:
        whole(stream.turn("Hello!", session=session, start=True))
    with pytest.raises(InferenceServerException, match=f"all {MAX_SESSIONS} sessions are in use"):
        whole(stream.turn("Hello!", session=sessions[-1], start=True))
    assert whole(stream.turn("And?", session=sessions[0])).text  # nobody else is touched
    whole(stream.turn(session=sessions[0], end=True))
    assert whole(stream.turn("Hello!", session=sessions[-1], start=True)).text


def test_buckets_count_what_is_at_most_their_bound() -> None:
    histogram = Histogram((0.1, 0.5))
    for value in (0.05, 0.1, 0.3, 0.5, 0.7):
        histogram.observe(value)
    samples = {
        f"{sample.name}{json.dumps(sample.labels)}": sample.value
        for sample in _histogram("h", "", histogram)
    }
    assert samples == {
        'h_bucket{"le": "0.1"}': 2,
        'h_bucket{"le": "0.5"}': 4,
        'h_bucket{"le": "+Inf"}': 5,
        "h_sum{}": pytest.approx(1.65),
        "h_count{}": 5,
    }
