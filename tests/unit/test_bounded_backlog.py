"""How far image_encoder runs ahead of the models that come next."""

from __future__ import annotations

import threading

import pytest

from llava_triton.serving.bounded_backlog import WINDOW, BoundedBacklog

SECONDS = 20.0


class NextModel:
    """Has taken in what was passed on to it as often as `taken_in` was released."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.taken_in = threading.Semaphore(0)

    def reach(self) -> None:
        self.asked.release()
        assert self.taken_in.acquire(timeout=SECONDS)


def passing(backlog: BoundedBacklog, requests: int) -> threading.Thread:
    """A thread that passes on so many."""

    def run() -> None:
        for _ in range(requests):
            backlog.pass_one()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_passes_on_two_windows_and_waits_for_the_next_models() -> None:
    model = NextModel()
    backlog = BoundedBacklog(model.reach)
    first = passing(backlog, 2 * WINDOW)
    first.join(SECONDS)
    assert not first.is_alive(), "it waits before there is a backlog"

    more = passing(backlog, WINDOW)
    assert model.asked.acquire(timeout=SECONDS)
    more.join(0.2)  # it would have ended at once
    assert more.is_alive(), "it does not wait for what has not been taken in"
    model.taken_in.release()
    more.join(SECONDS)
    assert not more.is_alive()
    model.taken_in.release(2)
    backlog.stop()


def test_asks_once_a_window() -> None:
    asked: list[None] = []
    backlog = BoundedBacklog(lambda: asked.append(None))
    passing(backlog, 10 * WINDOW + 5).join(SECONDS)
    backlog.stop()
    assert len(asked) == 10


def test_models_that_are_dead_hold_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def reach() -> None:
        raise RuntimeError("Stub process 'language_model_0_0' is not healthy.")

    backlog = BoundedBacklog(reach)
    thread = passing(backlog, 5 * WINDOW)
    thread.join(SECONDS)
    assert not thread.is_alive()
    backlog.stop()
    assert "not healthy" in caplog.text


def test_stop_lets_go_of_those_who_wait() -> None:
    model = NextModel()
    backlog = BoundedBacklog(model.reach)
    thread = passing(backlog, 3 * WINDOW)
    assert model.asked.acquire(timeout=SECONDS)
    stopping = threading.Thread(target=backlog.stop, daemon=True)
    stopping.start()
    thread.join(SECONDS)
    assert not thread.is_alive()
    model.taken_in.release(3)
    stopping.join(SECONDS)
    assert not stopping.is_alive()
