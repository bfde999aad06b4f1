"""What stands before the vision encoder: the memory of pictures, and the order of a session's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from llava_triton.encoded_images import EncodedImages
from llava_triton.in_order import InOrder
from tests.properties import given

ROW_BYTES = 4 * 3


def encode(pictures: Sequence[bytes]) -> Tensor:
    """Features [N, 1, 3] that tell which picture they are of."""
    rows = [[len(picture), sum(picture), picture[0]] for picture in pictures]
    return torch.tensor(rows, dtype=torch.float32)[:, None]


@given(
    st.lists(
        st.lists(st.binary(min_size=1, max_size=2), min_size=1, max_size=4), min_size=1, max_size=20
    ),
    st.integers(0, 5),
)
def test_features_are_those_of_the_picture_whatever_is_remembered(
    turns: list[list[bytes]], rows: int
) -> None:
    images = EncodedImages(rows * ROW_BYTES, b"")
    for pictures in turns:
        assert torch.equal(images.features(pictures, encode), encode(pictures))


def test_a_picture_is_encoded_once() -> None:
    images = EncodedImages(10 * ROW_BYTES, b"")
    calls: list[list[bytes]] = []

    def counted(pictures: Sequence[bytes]) -> Tensor:
        calls.append(list(pictures))
        return encode(pictures)

    images.features([b"a", b"b", b"a"], counted)
    images.features([b"b", b"c"], counted)
    assert calls == [[b"a", b"b"], [b"c"]]
    assert (images.hits, images.misses) == (2, 3)


def test_what_was_not_seen_for_long_is_forgotten_first() -> None:
    images = EncodedImages(2 * ROW_BYTES, b"")
    for picture in (b"a", b"b", b"a", b"c"):
        images.features([picture], encode)
    before = images.misses
    images.features([b"a"], encode)
    assert images.misses == before
    images.features([b"b"], encode)
    assert images.misses == before + 1


def test_a_picture_that_comes_while_it_is_encoded_is_waited_for() -> None:
    images = EncodedImages(10 * ROW_BYTES, b"")
    begun, go = threading.Event(), threading.Event()

    def slow(pictures: Sequence[bytes]) -> Tensor:
        begun.set()
        assert go.wait(10)
        return encode(pictures)

    def never(pictures: Sequence[bytes]) -> Tensor:
        raise AssertionError("encoded twice")

    with ThreadPoolExecutor() as threads:
        first = threads.submit(images.features, [b"a"], slow)
        assert begun.wait(10)
        second = threads.submit(images.features, [b"a"], never)
        while images.hits == 0:  # until the second one has looked
            assert not second.done()
        go.set()
        assert torch.equal(first.result(10), second.result(10))


def test_two_threads_with_each_others_pictures_do_not_wait_for_ever() -> None:
    images = EncodedImages(0, b"")  # nothing is remembered: every round begins anew
    with ThreadPoolExecutor(2) as threads:
        for _ in range(200):
            one = threads.submit(images.features, [b"a", b"b"], encode)
            two = threads.submit(images.features, [b"b", b"a"], encode)
            assert torch.equal(one.result(10), two.result(10).flip(0))


def test_a_failure_is_everybodys_and_is_not_remembered() -> None:
    images = EncodedImages(10 * ROW_BYTES, b"")

    def broken(pictures: Sequence[bytes]) -> Tensor:
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        images.features([b"a"], broken)
    assert torch.equal(images.features([b"a"], encode), encode([b"a"]))


def test_one_turns_bad_picture_is_not_another_turns_failure() -> None:
    images = EncodedImages(10 * ROW_BYTES, b"")
    begun, go = threading.Event(), threading.Event()

    def broken(pictures: Sequence[bytes]) -> Tensor:
        begun.set()
        assert go.wait(10)
        raise ValueError("the second one is no picture")

    with ThreadPoolExecutor(2) as threads:
        bad = threads.submit(images.features, [b"good", b"bad"], broken)
        assert begun.wait(10)
        good = threads.submit(images.features, [b"good"], encode)
        while not images.hits:  # it waits for what the other turn makes
            pass
        go.set()
        assert torch.equal(good.result(10), encode([b"good"]))
        with pytest.raises(ValueError, match="no picture"):
            bad.result(10)


def test_a_copy_that_fails_leaves_nobody_waiting() -> None:
    images = EncodedImages(10 * ROW_BYTES, b"")

    class NoRoom(Sequence[Tensor]):
        is_cuda = False

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: Any) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        images.features([b"a"], lambda pictures: NoRoom())  # type: ignore[arg-type,return-value]
    assert torch.equal(images.features([b"a"], encode), encode([b"a"]))


def test_a_job_that_raises_keeps_no_other_from_running() -> None:
    jobs = InOrder(workers=1, most_waiting=2)
    done = threading.Event()

    def broken() -> None:
        raise MemoryError

    for _ in range(5):
        while not jobs.submit("a", broken):
            pass
    while not jobs.submit("a", done.set):
        pass
    assert done.wait(10)
    jobs.shutdown()


def test_jobs_of_a_session_keep_their_order_and_sessions_do_not_wait() -> None:
    jobs = InOrder(workers=2, most_waiting=10)
    done: list[str] = []
    go, other = threading.Event(), threading.Event()

    def slow() -> None:
        assert go.wait(10)
        done.append("picture")

    assert jobs.submit("a", slow)
    assert jobs.submit("a", lambda: done.append("quick"), quick=True)
    assert jobs.submit("b", other.set)
    assert other.wait(10)
    assert jobs.submit("c", lambda: done.append("at once"), quick=True)
    assert done == ["at once"]
    go.set()
    jobs.shutdown()
    assert done == ["at once", "picture", "quick"]


def test_one_job_too_many_is_refused_at_once() -> None:
    jobs = InOrder(workers=1, most_waiting=2)
    go = threading.Event()
    done: list[int] = []
    assert jobs.submit("a", lambda: done.append(int(go.wait(10))))
    assert jobs.submit("b", lambda: done.append(2))
    assert not jobs.submit("c", lambda: done.append(3))
    assert jobs.submit("a", lambda: done.append(4), quick=True)
    go.set()
    jobs.shutdown()
    assert sorted(done) == [1, 2, 4]
