"""What stands before the vision encoder: the memory of pictures, and the order of their turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from llava_triton.contract.errors import ErrorCode, SessionError, invalid, unavailable
from llava_triton.pictures.encoding import MOST_BEGUN, PictureEncoding
from llava_triton.pictures.feature_cache import EncodedImages
from tests.properties import given

ROW_BYTES = 4 * 3
WAIT = 10.0


def pixels_of(picture: bytes) -> np.ndarray:
    """Tell which picture they are of: [1, 3, 1, 1]."""
    row = [len(picture), sum(picture), picture[0]]
    return np.array(row, dtype=np.float32).reshape(1, 3, 1, 1)


def features_of(pictures: Sequence[bytes]) -> Tensor:
    """Features [N, 1, 3] of pictures."""
    return torch.from_numpy(np.concatenate([pixels_of(each) for each in pictures])).view(-1, 1, 3)


@dataclass
class Fake:
    """A picture that was looked at; large if it begins with L, a video with V, damaged with x."""

    data: bytes
    decoding: Callable[[bytes], None]

    @property
    def is_large(self) -> bool:
        return self.data.startswith(b"L")

    @property
    def is_video(self) -> bool:
        return self.data.startswith(b"V")

    def decode(self) -> Fake:
        self.decoding(self.data)
        if self.data.startswith(b"x"):
            raise invalid("is damaged")
        return self

    @property
    def pixels(self) -> np.ndarray:
        return np.repeat(pixels_of(self.data), self.tokens, axis=0)

    @property
    def tokens(self) -> int:
        """One a tile: `name+3` has three."""
        return int(self.data.partition(b"+")[2] or 1)

    def features(self, tiles: Tensor) -> Tensor:
        return tiles.flatten(0, 1)


class Stage:
    """A `PictureEncoding` whose steps are noted, and wait where a test says so."""

    def __init__(self, budget_rows: int = 100, **limits: int) -> None:
        self.looked: list[bytes] = []
        self.decoded: list[bytes] = []
        self.batches: list[int] = []
        self.encoding_threads: set[int] = set()
        self.asked: list[Hashable] = []
        self.asking_threads: set[int] = set()
        self.gates: dict[bytes, threading.Event] = {}
        """Pictures whose decoding waits."""
        self.encode_gate = threading.Event()
        self.encode_gate.set()
        self.refuses = False
        self.on_encode: Callable[[np.ndarray], Any] | None = None
        self.pictures = PictureEncoding(
            self.look,
            self.encode,
            lambda session: self.ask_for_room(session),
            EncodedImages(budget_rows * ROW_BYTES, b""),
            **{"workers": 2, "max_batch": 8, "most_tokens": 20, "most_waiting": 100, **limits},
        )

    def look(self, item: bytes) -> Fake:
        self.looked.append(item)
        if item.startswith(b"?"):
            raise invalid("is no picture")
        return Fake(item, self.decode)

    def decode(self, data: bytes) -> None:
        self.decoded.append(data)
        if data in self.gates:
            assert self.gates[data].wait(WAIT)

    def encode(self, pixels: np.ndarray) -> Tensor:
        self.encoding_threads.add(threading.get_ident())
        self.batches.append(len(pixels))
        assert self.encode_gate.wait(WAIT)
        if self.on_encode is not None:
            return self.on_encode(pixels)  # type: ignore[no-any-return]
        return torch.from_numpy(pixels).view(-1, 1, 3)

    def ask_for_room(self, session: Hashable) -> None:
        self.asking_threads.add(threading.get_ident())
        self.asked.append(session)
        if self.refuses:
            raise unavailable("all sessions are in use")

    def turn(
        self, *pictures: bytes, session: Hashable = None, tenant: str = "", opening: Any = None
    ) -> Future[Tensor | None]:
        told: Future[Tensor | None] = Future()

        def answer(outcome: Sequence[Tensor] | SessionError) -> None:
            if isinstance(outcome, SessionError):
                told.set_exception(outcome)
            else:
                told.set_result(torch.stack(list(outcome)) if outcome else None)

        lane = object() if session is None else session
        self.pictures.submit(lane, pictures, answer, tenant=tenant, opening=opening)
        return told

    def features(self, *pictures: bytes, **turn: Any) -> Tensor | None:
        return self.turn(*pictures, **turn).result(WAIT)

    def hold(self, *pictures: bytes) -> None:
        """Let the decoding of pictures wait, until they are freed."""
        self.gates.update({each: threading.Event() for each in pictures})

    def free(self) -> None:
        self.encode_gate.set()
        for gate in self.gates.values():
            gate.set()


def until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    ticks = threading.Event()
    for _ in range(int(WAIT / 0.002)):
        if condition():
            return
        ticks.wait(0.002)
    raise AssertionError("it never came")


MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage() -> Iterator[MakeStage]:
    stages: list[Stage] = []

    def make(*arguments: int, **limits: int) -> Stage:
        stages.append(Stage(*arguments, **limits))
        return stages[-1]

    yield make
    for stage in stages:
        stage.free()
        stage.pictures.shutdown()


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    return make_stage()


_names = st.binary(min_size=1, max_size=2).filter(lambda data: b"+" not in data)
"""A plus would say how many tiles there are."""


@given(
    st.lists(
        st.lists(_names.map(lambda data: b"p" + data), max_size=4),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_features_are_those_of_the_picture_whatever_is_remembered(
    turns: list[list[bytes]], rows: int, sessions: int
) -> None:
    stage = Stage(rows, max_batch=3)
    try:
        told = [stage.turn(*each, session=i % sessions) for i, each in enumerate(turns)]
        for pictures, turn in zip(turns, told, strict=True):
            features = turn.result(WAIT)
            if pictures:
                assert features is not None
                assert torch.equal(features, features_of(pictures))
            else:
                assert features is None
        assert all(1 <= size <= 3 for size in stage.batches)
    finally:
        stage.pictures.shutdown()


def test_a_picture_is_encoded_once(stage: Stage) -> None:
    stage.features(b"a", b"b", b"a")
    stage.features(b"b", b"c")
    assert stage.decoded == [b"a", b"b", b"c"]
    assert sum(stage.batches) == 3
    assert (stage.pictures.hits, stage.pictures.misses) == (2, 3)


def test_what_was_not_seen_for_long_is_forgotten_first(make_stage: MakeStage) -> None:
    stage = make_stage(2)
    for picture in (b"a", b"b", b"a", b"c"):
        stage.features(picture)
    before = stage.pictures.misses
    stage.features(b"a")
    assert stage.pictures.misses == before
    stage.features(b"b")
    assert stage.pictures.misses == before + 1


def test_a_picture_that_comes_while_it_is_encoded_is_waited_for(stage: Stage) -> None:
    stage.encode_gate.clear()
    first = stage.turn(b"a")
    until(lambda: stage.batches)
    second = stage.turn(b"a")
    until(lambda: stage.pictures.hits)
    assert not second.done()
    stage.encode_gate.set()
    assert torch.equal(first.result(WAIT), second.result(WAIT))  # type: ignore[arg-type]
    assert stage.decoded == [b"a"]


def test_two_turns_with_each_others_pictures_do_not_wait_for_ever(make_stage: MakeStage) -> None:
    stage = make_stage(0)  # nothing is remembered: every round begins anew
    for _ in range(200):
        one, two = stage.turn(b"a", b"b"), stage.turn(b"b", b"a")
        assert torch.equal(one.result(WAIT), two.result(WAIT).flip(0))  # type: ignore[arg-type,union-attr]


def test_one_tenants_pictures_are_new_to_another(stage: Stage) -> None:
    for tenant in ("anna", "bert", "anna", "bert", ""):
        assert torch.equal(stage.features(b"a", tenant=tenant), features_of([b"a"]))  # type: ignore[arg-type]
    assert stage.decoded == [b"a"] * 3
    assert (stage.pictures.hits, stage.pictures.misses) == (2, 3)


def test_a_tenant_does_not_wait_for_anothers_picture_either(stage: Stage) -> None:
    """How long it took would tell of it."""
    stage.encode_gate.clear()
    stage.turn(b"a", tenant="anna")
    until(lambda: stage.batches)
    stage.turn(b"a", tenant="bert")
    until(lambda: stage.decoded == [b"a"] * 2)
    assert stage.pictures.hits == 0


def test_a_failure_is_everybodys_who_waits_and_is_not_remembered(stage: Stage) -> None:
    def broken(pixels: np.ndarray) -> Tensor:
        raise ValueError("no encoder")

    stage.on_encode = broken
    stage.encode_gate.clear()
    turns = [stage.turn(b"a"), stage.turn(b"a")]
    until(lambda: stage.pictures.hits)
    stage.encode_gate.set()
    for turn in turns:
        with pytest.raises(SessionError, match="no encoder") as told:
            turn.result(WAIT)
        assert told.value.code is ErrorCode.INTERNAL
    stage.on_encode = None
    assert torch.equal(stage.features(b"a"), features_of([b"a"]))  # type: ignore[arg-type]


def test_one_turns_bad_picture_is_not_another_turns_failure(stage: Stage) -> None:
    stage.hold(b"good")
    bad = stage.turn(b"good", b"x bad")
    until(lambda: stage.decoded)
    good = stage.turn(b"good")
    until(lambda: stage.pictures.hits)  # it waits for what the other turn makes
    stage.free()
    assert torch.equal(good.result(WAIT), features_of([b"good"]))  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="image 2 of 2 is damaged"):
        bad.result(WAIT)


def test_a_failed_turns_later_pictures_are_still_made_for_others(stage: Stage) -> None:
    stage.hold(b"x bad")
    bad = stage.turn(b"x bad", b"later")
    until(lambda: stage.decoded)
    other = stage.turn(b"later")
    stage.free()
    assert torch.equal(other.result(WAIT), features_of([b"later"]))  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="image 1 of 2"):
        bad.result(WAIT)


def test_what_fails_together_is_tried_alone(make_stage: MakeStage) -> None:
    stage = make_stage(workers=4)

    def broken(pixels: np.ndarray) -> Tensor:
        if (pixels[:, 2] == ord("h")).any():
            raise ValueError("a hard one")
        return torch.from_numpy(pixels).view(-1, 1, 3)

    stage.on_encode = broken
    stage.encode_gate.clear()
    turns = {data: stage.turn(data) for data in (b"first", b"easy", b"hard", b"other")}
    until(lambda: len(stage.decoded) == 4)
    stage.encode_gate.set()
    with pytest.raises(SessionError, match="a hard one"):
        turns.pop(b"hard").result(WAIT)
    for data, turn in turns.items():
        assert torch.equal(turn.result(WAIT), features_of([data]))  # type: ignore[arg-type]


def test_a_copy_that_fails_leaves_nobody_waiting(stage: Stage) -> None:
    class NoRoom(Sequence[Tensor]):
        is_cuda = False

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: Any) -> Any:
            raise MemoryError

    stage.on_encode = lambda pixels: NoRoom()
    with pytest.raises(SessionError, match="could not be encoded"):
        stage.features(b"a")
    stage.on_encode = None
    assert torch.equal(stage.features(b"a"), features_of([b"a"]))  # type: ignore[arg-type]


def test_the_bad_one_of_several_is_named_without_looking_twice(stage: Stage) -> None:
    stage.features(b"known")
    stage.looked.clear()
    for bad, said in ((b"? is none", "is no picture"), (b"x is damaged", "is damaged")):
        with pytest.raises(SessionError, match=f"^INVALID_ARG: image 3 of 4 {said}"):
            stage.features(b"new" + bad, b"known", bad, b"not looked at")
    assert stage.looked == [b"new? is none", b"? is none", b"newx is damaged", b"x is damaged"]


def test_an_answer_that_fails_keeps_no_other_from_its_own(make_stage: MakeStage) -> None:
    stage = make_stage(most_waiting=2)
    told: list[object] = []

    def broken(outcome: object) -> None:
        told.append(outcome)
        raise MemoryError

    for _ in range(5):
        stage.pictures.submit("a", [b"a"], broken)
        assert torch.equal(stage.features(b"b", session="a"), features_of([b"b"]))  # type: ignore[arg-type]
    # Each heard of its features and, when it could not hand them on, of that.
    assert [isinstance(each, SessionError) for each in told] == [False, True] * 5


def test_turns_of_a_session_keep_their_order_and_sessions_do_not_wait(stage: Stage) -> None:
    stage.hold(b"slow")
    done: list[str] = []
    stage.pictures.submit("a", [b"slow"], lambda _: done.append("picture"))
    stage.pictures.submit("a", [], lambda _: done.append("text"))
    stage.pictures.submit("a", [b"quick"], lambda _: done.append("another"))
    last = stage.turn(session="a")
    assert stage.features(b"other", session="b") is not None
    assert stage.features(session="c") is None
    assert done == []
    assert b"quick" not in stage.decoded
    stage.free()
    assert last.result(WAIT) is None
    assert done == ["picture", "text", "another"]


def test_one_turn_too_many_is_refused_at_once(make_stage: MakeStage) -> None:
    stage = make_stage(most_waiting=2)
    stage.hold(b"slow")
    turns = [stage.turn(b"slow", session="a"), stage.turn(b"b", session="a")]
    with pytest.raises(SessionError, match="2 turns with pictures are waiting") as told:
        stage.turn(b"c", session="b")
    assert told.value.code is ErrorCode.UNAVAILABLE
    turns.append(stage.turn(session="a"))
    stage.free()
    assert [turn.result(WAIT) is None for turn in turns] == [False, False, True]


def test_one_thread_encodes_batches_of_several_sessions(make_stage: MakeStage) -> None:
    stage = make_stage(max_batch=4)
    stage.encode_gate.clear()
    turns = [stage.turn(b"first")]
    until(lambda: stage.batches == [1])
    turns += [stage.turn(b"%d" % number, session=number) for number in range(1, 8)]
    until(lambda: len(stage.decoded) == 8)
    stage.encode_gate.set()
    for turn in turns:
        turn.result(WAIT)
    assert stage.batches == [1, 4, 3]
    assert len(stage.encoding_threads) == 1


def test_pixel_values_are_made_no_faster_than_they_are_encoded(make_stage: MakeStage) -> None:
    stage = make_stage(max_batch=2)
    stage.encode_gate.clear()
    turns = [stage.turn(b"%d" % number) for number in range(1, 40)]
    until(lambda: len(stage.decoded) >= 5)
    assert len(stage.decoded) <= 2 * 2 + 2 + 2  # those that wait, a batch, and one a worker
    stage.encode_gate.set()
    for turn in turns:
        turn.result(WAIT)


def test_a_single_picture_does_not_wait_for_a_turns_many(make_stage: MakeStage) -> None:
    """Sessions take turns picture by picture, whatever they sent first."""
    stage = make_stage(workers=2)
    many = {name: [b"%c%d" % (name, n) for n in range(8)] for name in b"abc"}
    held = [pictures[0] for pictures in many.values()][:2]
    stage.hold(*held)
    turns = [stage.turn(*pictures, session=name) for name, pictures in many.items()]
    until(lambda: len(stage.decoded) == 2)  # both workers are busy
    turns += [stage.turn(b"single", session="d")]
    stage.free()
    for turn in turns:
        turn.result(WAIT)
    # Behind one picture of each that came before, and of no more than one worker's beside it.
    assert stage.decoded.index(b"single") <= 2 + 3


def test_large_pictures_are_decoded_one_at_a_time_and_others_between(stage: Stage) -> None:
    large = [b"L%d" % number for number in range(4)]
    stage.hold(*large)
    turns = [stage.turn(each, b"small" + each, session=each) for each in large]
    until(lambda: len(stage.looked) == 4)
    assert stage.features(b"mine", b"and mine") is not None
    assert [each for each in stage.decoded if each in large] == large[:1]
    for count, each in enumerate(large, start=1):
        stage.gates[each].set()
        turns[count - 1].result(WAIT)
        until(lambda: sum(each in large for each in stage.decoded) == min(4, count + 1))  # noqa: B023
    assert [each for each in stage.decoded if each in large] == large


def test_a_video_that_takes_long_keeps_videos_waiting_and_nothing_else(stage: Stage) -> None:
    stage.hold(b"V0")
    videos = [stage.turn(b"V%d" % number) for number in range(3)]
    until(lambda: b"V0" in stage.decoded)
    for number in range(4):  # more than there are workers
        assert stage.features(b"L%d" % number, b"small%d" % number) is not None
    assert [each for each in stage.decoded if each.startswith(b"V")] == [b"V0"]
    stage.free()
    for video in videos:
        assert video.result(WAIT) is not None
    assert [each for each in stage.decoded if each.startswith(b"V")] == [b"V0", b"V1", b"V2"]


def test_large_pictures_of_many_are_taken_in_turn(stage: Stage) -> None:
    stage.hold(b"L first")
    turns = [stage.turn(*[b"L%d%d" % (name, n) for n in range(8)]) for name in (1, 2)]
    turns.append(stage.turn(b"L single"))
    stage.free()
    for turn in turns:
        turn.result(WAIT)
    assert stage.decoded.index(b"L single") <= 5


def test_few_turns_of_several_pictures_are_begun_at_once(make_stage: MakeStage) -> None:
    """Each keeps the features that it has."""
    stage = make_stage(0, most_waiting=1000)
    count = 3 * MOST_BEGUN
    lasts = [b"%d last" % number for number in range(100, 100 + count)]
    stage.hold(*lasts)
    turns = [stage.turn(b"first" + last, b"second" + last, last) for last in lasts]
    until(lambda: sum(each in lasts for each in stage.decoded) == 2)
    begun = {each[5:] for each in stage.decoded if each.startswith(b"first")}
    assert len(begun) <= MOST_BEGUN
    stage.free()
    for last, turn in zip(lasts, turns, strict=True):
        expected = features_of([b"first" + last, b"second" + last, last])
        assert torch.equal(turn.result(WAIT), expected)  # type: ignore[arg-type]


def test_room_is_asked_for_before_an_openings_new_pictures_are_looked_at(stage: Stage) -> None:
    stage.features(b"known")
    stage.looked.clear()
    stage.refuses = True
    with pytest.raises(SessionError, match="all sessions are in use") as told:
        stage.features(b"known", b"L new", b"another", session=7, opening=7)
    assert told.value.code is ErrorCode.UNAVAILABLE
    assert (stage.asked, stage.looked) == ([7], [])
    stage.refuses = False
    assert stage.features(b"known", b"L new", b"another", session=7, opening=7) is not None
    assert stage.asked == [7, 7]  # once a turn
    assert len(stage.asking_threads) == 1
    assert not stage.asking_threads & stage.encoding_threads


def test_room_is_asked_for_where_it_matters_only(stage: Stage) -> None:
    stage.refuses = True
    assert stage.features(b"of an open session", session="a") is not None
    assert stage.features(session="b", opening="b") is None
    assert stage.features(b"of an open session", session="c", opening="c") is not None
    assert stage.asked == []


def test_room_that_cannot_be_asked_for_is_found_out_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ask_for_room", lambda session: 1 / 0)
    assert stage.features(b"a", session=1, opening=1) is not None


def test_at_the_end_those_who_wait_are_told(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.hold(b"a", b"b")
    turns = [stage.turn(each, session=each) for each in (b"a", b"b", b"c")]
    turns += [stage.turn(session=b"c"), stage.turn(b"d", session=b"c")]
    until(lambda: len(stage.decoded) == 2)
    ending = threading.Thread(target=stage.pictures.shutdown)
    ending.start()
    until(lambda: stage.pictures.stopping)
    stage.free()
    ending.join(WAIT)
    assert not ending.is_alive()
    assert [turn.exception(0) is None for turn in turns[2:]] == [False, True, False]
    with pytest.raises(SessionError, match="shutting down"):
        stage.turn(b"late")


# Tiles


def test_a_picture_of_many_tiles_keeps_nobody_waiting(make_stage: MakeStage) -> None:
    stage = make_stage(max_batch=4)
    batches: list[list[int]] = []

    def note(pixels: np.ndarray) -> Tensor:
        batches.append([int(length) for length in pixels[:, 0, 0, 0]])
        return torch.from_numpy(pixels).view(-1, 1, 3)

    stage.on_encode = note
    stage.encode_gate.clear()
    large = stage.turn(b"large+11")
    until(lambda: stage.batches == [4])
    small = stage.turn(b"small")
    until(lambda: stage.pictures.waiting_to_encode == 2)
    stage.encode_gate.set()
    assert small.result(WAIT) is not None
    rows = large.result(WAIT)
    assert rows is not None
    assert torch.equal(rows[0], features_of([b"large+11"] * 11).flatten(0, 1))
    # Into the batch after the one that was being computed, between tiles of the large one.
    assert batches == [[8] * 4, [8, 5, 8, 8], [8] * 4]


def test_tiles_of_several_pictures_are_put_together_again(make_stage: MakeStage) -> None:
    stage = make_stage(max_batch=3)
    names = [b"a+4", b"b", b"cc+5", b"d+2", b"e"]
    stage.hold(*names)
    turns = [stage.turn(name) for name in names]
    stage.free()
    for name, turn in zip(names, turns, strict=True):
        rows = turn.result(WAIT)
        assert rows is not None
        count = int(name.partition(b"+")[2] or 1)
        assert torch.equal(rows[0], features_of([name] * count).flatten(0, 1))
    assert sum(stage.batches) == 13
    assert max(stage.batches) <= 3


@pytest.mark.parametrize(
    ("pictures", "said", "encoded"),
    [
        ([b"a+21"], "image would take 21 tokens and the model's context is 20", 0),
        ([b"a+9", b"b+9", b"c+9"], "3 of the turn's 3 images would take 27 tokens", 18),
        ([b"a+19", b"b+2", b"c"], "2 of the turn's 3 images would take 21 tokens", 19),
    ],
)
def test_pictures_longer_than_the_context_are_refused_before_they_are_encoded(
    make_stage: MakeStage, pictures: list[bytes], said: str, encoded: int
) -> None:
    stage = make_stage()
    with pytest.raises(SessionError, match=said) as caught:
        stage.features(*pictures)
    assert caught.value.code is ErrorCode.INVALID_ARG
    # Also where what was encoded meanwhile is known already.
    with pytest.raises(SessionError, match=said):
        stage.features(*pictures)
    assert stage.features(b"other") is not None
    assert sum(stage.batches) - 1 <= 2 * encoded
    assert b"c" not in stage.decoded


def test_a_tile_that_fails_fails_its_picture_alone(make_stage: MakeStage) -> None:
    stage = make_stage(max_batch=2)

    def fail_on_bad(pixels: np.ndarray) -> Tensor:
        if (pixels[:, 2] == ord("b")).any():
            raise RuntimeError("no memory")
        return torch.from_numpy(pixels).view(-1, 1, 3)

    stage.on_encode = fail_on_bad
    bad, good = stage.turn(b"bad+7"), stage.turn(b"good+7")
    with pytest.raises(SessionError, match="no memory"):
        bad.result(WAIT)
    rows = good.result(WAIT)
    assert rows is not None
    assert torch.equal(rows[0], features_of([b"good+7"] * 7).flatten(0, 1))
    stage.on_encode = None
    assert stage.features(b"bad+7") is not None
