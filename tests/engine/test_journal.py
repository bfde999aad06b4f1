"""Sessions that outlive their engine: written down, resumed, hibernated."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.operations import Operation
from llava_triton.engine.session import SessionId
from llava_triton.engine.state import EngineState
from llava_triton.journal import writer
from llava_triton.journal.records import picture_path, session_key
from llava_triton.journal.store import Entry, Store, StoreError
from tests.engine_harness import PATIENCE_SECONDS, EngineHarness, Pending
from tests.small_engine import PICTURES, Alone, Ask, Start, failure
from tests.waiting import wait_until

RESUME = Operation(resume=True)
FIRST = Ask("What is it?", (PICTURES[0],))
SECOND = Ask("Why so?")
THIRD = Ask("And the other one?", (PICTURES[1], PICTURES[0]))
FOURTH = Ask("Are they alike?")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a journal"


@pytest.fixture
def journaled(start: Start, folder: Path) -> Callable[..., EngineHarness]:
    """Starts engines that share a journal."""
    return lambda **limits: start(journal=folder.as_uri(), **limits)


def safe(harness: EngineHarness, session_id: SessionId = "s") -> None:
    """Wait until all of a session is in the journal."""
    log = harness.session(session_id).log
    assert log is not None
    wait_until(lambda: log.is_safe)


def settled(harness: EngineHarness) -> None:
    """Wait until the journal has done all that it was asked for."""
    harness.inspect(lambda _: None)
    harness.journal.flush().result(PATIENCE_SECONDS)


def lose(harness: EngineHarness) -> None:
    """The server dies, and another one takes its place."""
    harness.restart()


def resume(turn: Ask, harness: EngineHarness, session_id: SessionId = "s") -> Pending:
    return turn.submit(harness, session_id, start=True, operation=RESUME)


def state(harness: EngineHarness, session_id: SessionId = "s") -> tuple[Any, ...]:
    session = harness.session(session_id)
    return harness.inspect(
        lambda _: (
            list(session.tokens),
            [(span.start, span.length, span.image.digest) for span in session.spans],
            list(session.turns),
            [image.digest for image in session.images],
            session.pending_images,
        )
    )


def files(folder: Path) -> list[Path]:
    # Folders may vanish meanwhile, which `rglob` does not take.
    return [Path(place) / name for place, _, names in os.walk(folder) for name in names]


def test_a_resumed_session_answers_as_the_lost_one_would(
    journaled: Callable[..., EngineHarness], alone: Alone
) -> None:
    expected = alone(FIRST, SECOND, THIRD, FOURTH)
    harness = journaled()
    said = [FIRST.wait(harness, "s", start=True)[0]]
    said += [turn.wait(harness, "s")[0] for turn in (SECOND, THIRD)]
    before = state(harness)
    safe(harness)
    lose(harness)
    text, final = resume(FOURTH, harness).wait()
    assert [*said, text] == expected
    assert harness.encoded == 2  # each picture once
    tokens, turns = before[0], before[2]
    now = harness.session("s")
    assert now.tokens[: len(tokens)] == tokens
    assert now.turns[:3] == turns
    assert final.num_input_tokens > len(tokens)
    harness.check_state()
    # It is an open session like any other, and goes on in the journal.
    safe(harness)
    lose(harness)
    assert harness.ask("s", start=True, operation=RESUME)[1].finish_reason == "prefilled"
    assert len(harness.session("s").turns) == 4


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_was_taken_back_stays_taken_back(
    journaled: Callable[..., EngineHarness], alone: Alone, kept: int
) -> None:
    turns = (FIRST, SECOND, THIRD)
    harness = journaled()
    for index, turn in enumerate(turns):
        turn.wait(harness, "s", start=index == 0)
    harness.ask("s", operation=Operation(rewind=kept))
    safe(harness)
    before = state(harness)
    lose(harness)
    harness.ask("s", start=True, operation=RESUME)
    assert state(harness) == before
    assert FOURTH.wait(harness, "s")[0] == alone(*turns[:kept], FOURTH)[-1]


def test_all_that_a_session_can_be_is_resumed(journaled: Callable[..., EngineHarness]) -> None:
    harness = journaled()
    past = [PastTurn("What is it?", "a red square", 1), PastTurn("And now?", "blue")]
    harness.ask("history", "So?", PICTURES[:2], start=True, history=past)
    harness.ask("shown", None, PICTURES[:2], start=True)
    harness.ask("empty", start=True)
    harness.ask("stopped", "What is it?", PICTURES[2:3], start=True, stop=("e",))
    harness.ask("again", "What is it?", PICTURES[3:4], start=True)
    harness.ask("again", None, PICTURES[4:5])
    harness.ask("again", operation=Operation(regenerate=True), temperature=1.0, seed=5)
    harness.ask("again", None, PICTURES[5:6])
    harness.ask("fork", start=True, operation=Operation(fork="again"))
    harness.ask("fork", "Is it?", PICTURES[6:7])
    harness.ask(7, "A number?", start=True, tenant="alice")
    names: list[tuple[SessionId, str]] = [
        *((name, "") for name in ("history", "shown", "empty", "stopped", "again", "fork")),
        (7, "alice"),
    ]
    for name, _ in names:
        safe(harness, name)
    before = {name: state(harness, name) for name, _ in names}
    lose(harness)
    for name, tenant in names:
        harness.ask(name, start=True, tenant=tenant, operation=RESUME)
    assert {name: state(harness, name) for name, _ in names} == before
    harness.check_state()


def test_the_end_of_a_session_is_the_end_of_its_records(
    journaled: Callable[..., EngineHarness], folder: Path
) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    harness.ask("fork", start=True, operation=Operation(fork="s"))
    SECOND.wait(harness, "s", end=True)  # the fork's pictures may not be copied yet
    safe(harness, "fork")
    wait_until(lambda: not files(folder / session_key("s", "")))
    lose(harness)
    assert failure(resume(SECOND, harness)) is ErrorCode.NOT_FOUND
    assert resume(SECOND, harness, "fork").wait()[1].num_output_tokens
    # One that is not open ends as well, and a new one takes the place of one that is not.
    safe(harness, "fork")
    lose(harness)
    _, final = harness.ask("fork", start=True, end=True, operation=RESUME)
    assert final.finish_reason == "closed"
    wait_until(lambda: not files(folder))
    harness.assert_nothing_is_held()


def test_a_session_that_has_ended_is_not_resumed_while_the_store_still_has_it(
    journaled: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    asked = threading.Event()
    delete, wait = Store.delete, writer.Writer.settled

    async def slow(store: Store, paths: list[str]) -> None:
        assert await asyncio.to_thread(asked.wait, 60)
        await delete(store, paths)

    async def settle(journal_writer: writer.Writer, key: str) -> None:
        asked.set()
        await wait(journal_writer, key)

    monkeypatch.setattr(Store, "delete", slow)
    monkeypatch.setattr(writer.Writer, "settled", settle)
    harness.ask("s", end=True)
    assert failure(resume(SECOND, harness)) is ErrorCode.NOT_FOUND


def test_a_session_is_not_read_before_a_store_that_hangs_has_its_end(
    journaled: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    go_on = threading.Event()

    async def hang(store: Store, paths: list[str]) -> None:
        assert await asyncio.to_thread(go_on.wait, 60)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", hang)
        patch.setattr(writer, "SYNC_SECONDS", 0.05)
        harness.ask("s", end=True)
        assert failure(resume(SECOND, harness)) is ErrorCode.UNAVAILABLE
    go_on.set()


def test_a_session_opened_anew_forgets_the_lost_one(
    journaled: Callable[..., EngineHarness], folder: Path
) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    THIRD.wait(harness, "s", start=True)  # on the open one
    safe(harness)
    lose(harness)
    certain = time.time() + 2 * writer.UNCERTAIN_SECONDS  # else pictures may be the new one's
    wait_until(lambda: time.time() > certain)
    SECOND.wait(harness, "s", start=True)  # on the one in the journal
    safe(harness)
    key = folder / session_key("s", "")
    assert {path.name for path in files(key)} == {"00000001"}
    lose(harness)
    harness.ask("s", start=True, operation=RESUME)
    assert len(harness.session("s").turns) == 1
    assert not harness.session("s").images


def test_all_that_ask_at_once_are_resumed_once(
    journaled: Callable[..., EngineHarness], alone: Alone
) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    lose(harness)
    turns = [resume(SECOND, harness), resume(THIRD, harness), resume(FOURTH, harness)]
    expected = alone(FIRST, SECOND, THIRD, FOURTH)[1:]
    assert [turn.wait()[0] for turn in turns] == expected
    assert harness.encoded == 1
    assert len(harness.session("s").turns) == 4
    # One that is open goes on as it is.
    assert resume(SECOND, harness).wait()
    assert harness.encoded == 1


def test_whoever_may_not_resume_learns_nothing(journaled: Callable[..., EngineHarness]) -> None:
    harness = journaled()
    harness.ask("s", "What is it?", start=True, tenant="alice")
    safe(harness)
    for _ in range(2):
        for tenant in ("", "bob"):
            ask = harness.submit("s", "?", start=True, tenant=tenant, operation=RESUME)
            assert failure(ask) is ErrorCode.NOT_FOUND
        lose(harness)
    assert failure(harness.submit("x", "?", start=True, operation=RESUME)) is ErrorCode.NOT_FOUND
    assert failure(harness.submit("x", "?", operation=RESUME)) is ErrorCode.INVALID_ARG
    both = Operation(resume=True, fork="s")
    assert failure(harness.submit("x", start=True, operation=both)) is ErrorCode.INVALID_ARG


def test_who_asks_first_for_a_lost_session_is_not_its_owner(
    journaled: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = journaled()
    harness.ask("s", "What is it?", start=True, tenant="alice")
    safe(harness)
    lose(harness)
    may_read, entries = threading.Event(), Store.entries

    async def slow(self: Store, prefix: str) -> list[Entry]:
        while not may_read.is_set():
            await asyncio.sleep(0.005)
        return await entries(self, prefix)

    monkeypatch.setattr(Store, "entries", slow)
    stranger = harness.submit("s", "?", start=True, tenant="bob", operation=RESUME)
    owner = harness.submit("s", "Why so?", start=True, tenant="alice", operation=RESUME)
    behind = harness.submit("s", "?", tenant="bob")
    anew = harness.submit("s", "?", start=True, tenant="bob")
    may_read.set()
    assert failure(stranger) is ErrorCode.NOT_FOUND
    assert failure(behind) is ErrorCode.NOT_FOUND
    assert failure(anew) is ErrorCode.INVALID_ARG  # taken
    assert owner.wait()
    assert len(harness.session("s").turns) == 2
    harness.check_state()


def test_without_a_journal_there_is_nothing_to_resume(start: Start) -> None:
    harness = start()
    assert failure(resume(FIRST, harness)) is ErrorCode.NOT_FOUND
    FIRST.wait(harness, "s", start=True)
    assert resume(SECOND, harness).wait()
    assert len(harness.session("s").turns) == 2


def test_another_model_does_not_go_on(journaled: Callable[..., EngineHarness]) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    harness.identity = "another checkpoint"
    lose(harness)
    with pytest.raises(SessionError, match="another model has answered") as caught:
        resume(SECOND, harness).wait()
    assert caught.value.code is ErrorCode.INVALID_ARG


@pytest.mark.parametrize("jump", [-86_400.0, 0.0, 1_199.0, 1_201.0])
def test_an_expired_session_is_not_resumed(
    journaled: Callable[..., EngineHarness], jump: float
) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    harness.wall.now += jump
    SECOND.wait(harness, "s")  # its own clock has not jumped
    safe(harness)
    lose(harness)
    harness.wall.now += 1_201.0 if jump > 1_200.0 else 0.0
    if jump > 1_200.0:
        assert failure(resume(FOURTH, harness)) is ErrorCode.NOT_FOUND
    else:
        assert resume(FOURTH, harness).wait()
        opened = harness.session("s").opened_at
        assert opened == pytest.approx(harness.clock.now - max(0.0, jump), abs=60.0)


def test_expiry_deletes(journaled: Callable[..., EngineHarness], folder: Path) -> None:
    harness = journaled()
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    harness.clock.now += 1_201.0
    wait_until(lambda: harness.expired)
    wait_until(lambda: not files(folder))


def damage(folder: Path, how: str) -> None:
    records = folder / session_key("s", "") / "records"
    last = records / "00000003"
    if how == "cut off":
        last.write_bytes(last.read_bytes()[:-40])
    elif how == "bit flipped":
        data = bytearray(last.read_bytes())
        data[200] ^= 1
        last.write_bytes(data)
    elif how == "empty":
        last.write_bytes(b"")
    elif how == "foreign":
        other = folder / session_key("other", "") / "records" / "00000001"
        shutil.copy(other, last)
    elif how == "missing":
        (records / "00000002").unlink()
    elif how == "picture missing":
        next(iter((records.parent / "pictures").iterdir())).unlink()
    elif how == "picture damaged":
        picture = next(iter((records.parent / "pictures").iterdir()))
        picture.write_bytes(picture.read_bytes()[:-1])


@pytest.mark.parametrize(
    "how",
    ["cut off", "bit flipped", "empty", "foreign", "missing", "picture missing", "picture damaged"],
)
def test_a_damaged_journal_is_one_error_for_its_session(
    journaled: Callable[..., EngineHarness], folder: Path, how: str
) -> None:
    harness = journaled()
    FIRST.wait(harness, "other", start=True)
    FIRST.wait(harness, "s", start=True)
    SECOND.wait(harness, "s")
    THIRD.wait(harness, "s")
    safe(harness)
    safe(harness, "other")
    lose(harness)
    damage(folder, how)
    with pytest.raises(SessionError, match="its journal is damaged") as caught:
        resume(FOURTH, harness).wait()
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert resume(SECOND, harness, "other").wait()[1].num_output_tokens
    harness.check_state()
    # The ID can be used again.
    FIRST.wait(harness, "s", start=True)
    safe(harness)


def test_of_two_servers_the_second_writer_loses(
    journaled: Callable[..., EngineHarness], alone: Alone
) -> None:
    one, other = journaled(), journaled()
    FIRST.wait(one, "s", start=True)
    safe(one)
    assert resume(SECOND, other).wait()
    safe(other)
    # The first one was stopped meanwhile, and goes on.
    THIRD.wait(one, "s")
    log = one.session("s").log
    assert log is not None
    wait_until(lambda: log.elsewhere)
    with pytest.raises(SessionError, match="goes on on another server") as caught:
        FOURTH.wait(one, "s")
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert failure(FOURTH.submit(one, "s")) is ErrorCode.NOT_FOUND
    assert one.expired == ["s"]
    lose(other)
    text, _ = resume(FOURTH, one).wait()
    assert text == alone(FIRST, SECOND, FOURTH)[-1]


def test_in_sync_the_loser_is_told_with_its_turn(
    journaled: Callable[..., EngineHarness],
) -> None:
    one, other = journaled(journal_sync=True), journaled(journal_sync=True)
    FIRST.wait(one, "s", start=True)
    assert resume(SECOND, other).wait()
    with pytest.raises(SessionError, match="goes on on another server"):
        THIRD.wait(one, "s")
    assert failure(FOURTH.submit(one, "s")) is ErrorCode.NOT_FOUND
    assert resume(FOURTH, one).wait()
    assert len(one.session("s").turns) == 3


class Faulty:
    """A store that can be down, or hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.down = False
        self.hangs = threading.Event()
        self.hangs.set()
        create, outer = Store.create, self

        async def faulty(self: Store, path: str, data: bytes) -> bool:
            while not outer.hangs.is_set():
                await asyncio.sleep(0.005)
            if outer.down:
                raise StoreError("no space left on the device")
            return await create(self, path, data)

        monkeypatch.setattr(Store, "create", faulty)


def test_a_store_that_is_down_stops_no_answer(
    journaled: Callable[..., EngineHarness], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOST_WAITING", 2)
    expected = alone(FIRST, SECOND, THIRD, FOURTH)
    store = Faulty(monkeypatch)
    harness = journaled()
    store.down = True
    said = [FIRST.wait(harness, "s", start=True)[0]]
    said += [turn.wait(harness, "s")[0] for turn in (SECOND, THIRD)]
    now = harness.engine.statistics().journal
    assert now is not None
    assert (now.waiting, now.dropped) == (2, 1)
    store.down = False
    log = harness.session("s").log
    assert log is not None
    wait_until(lambda: not log.waiting)
    assert not log.is_safe  # the third turn is missing, until the next one brings all
    said.append(FOURTH.wait(harness, "s")[0])
    assert said == expected
    safe(harness)
    before = state(harness)
    lose(harness)
    harness.ask("s", start=True, operation=RESUME)
    assert state(harness) == before


def test_in_sync_an_answer_waits_for_its_record(
    journaled: Callable[..., EngineHarness], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Faulty(monkeypatch)
    harness = journaled(journal_sync=True)
    FIRST.wait(harness, "s", start=True)
    safe(harness)
    store.hangs.clear()
    waiting = SECOND.submit(harness, "s")
    beside = Ask("Who?").submit(harness, "beside", start=True)
    pieces = iter(waiting.deltas())
    wait_until(lambda: harness.engine.statistics().journal.waiting == 2)  # type: ignore[union-attr]
    assert not next(pieces).is_final
    store.hangs.set()
    assert list(pieces)[-1].is_final
    assert beside.wait()
    before = state(harness)
    store.down = True
    with monkeypatch.context() as patch:
        patch.setattr(writer, "SYNC_SECONDS", 0.2)
        with pytest.raises(SessionError, match="could not be written to the journal") as caught:
            THIRD.wait(harness, "s")
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert state(harness) == before
    harness.check_state()
    store.down = False
    assert THIRD.wait(harness, "s")[0] == alone(FIRST, SECOND, THIRD)[-1]
    lose(harness)
    harness.ask("s", start=True, operation=RESUME)
    assert len(harness.session("s").turns) == 3


def test_in_sync_a_turn_that_is_cancelled_while_it_is_written_did_not_happen(
    journaled: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Faulty(monkeypatch)
    harness = journaled(journal_sync=True)
    FIRST.wait(harness, "s", start=True)
    before = state(harness)
    store.hangs.clear()
    waiting = SECOND.submit(harness, "s")
    wait_until(lambda: harness.engine.statistics().journal.waiting)  # type: ignore[union-attr]
    harness.engine.cancel(waiting.id)
    assert failure(waiting) is ErrorCode.CANCELLED
    store.hangs.set()
    safe(harness)
    lose(harness)
    harness.ask("s", start=True, operation=RESUME)
    assert state(harness) == before


def test_more_sessions_are_open_than_there_is_room_for(
    journaled: Callable[..., EngineHarness], alone: Alone, folder: Path
) -> None:
    harness = journaled(max_sessions=3)
    pictures = {number: Ask("What is it?", (PICTURES[number % 8],)) for number in range(12)}
    for number, turn in pictures.items():
        turn.wait(harness, number + 1, start=True)
        safe(harness, number + 1)
        assert harness.engine.statistics().sessions_open <= 3
    assert harness.expired == list(range(1, 10))
    for number in (0, 11, 5, 3, 0, 8):
        text, _ = resume(SECOND, harness, number + 1).wait()
        session = harness.session(number + 1)
        asked = [SECOND] * (len(session.turns) - 1)
        assert text == alone(pictures[number], *asked)[-1]
        safe(harness, number + 1)
    for number in pictures:
        _, final = harness.ask(number + 1, start=True, end=True, operation=RESUME)
        assert final.finish_reason == "closed"
    wait_until(lambda: not files(folder))
    harness.assert_nothing_is_held()


def test_a_session_that_is_not_safe_does_not_hibernate(
    journaled: Callable[..., EngineHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Faulty(monkeypatch)
    harness = journaled(max_sessions=1)
    store.hangs.clear()
    FIRST.wait(harness, "s", start=True)
    assert failure(FIRST.submit(harness, "t", start=True)) is ErrorCode.UNAVAILABLE
    store.hangs.set()
    safe(harness)
    FIRST.wait(harness, "t", start=True)

    def open_now(state: EngineState) -> list[SessionId]:
        return [session.id for session in state.sessions.oldest_first()]

    assert harness.inspect(open_now) == ["t"]


def test_a_session_that_went_on_elsewhere_survives_its_expiry_here(
    journaled: Callable[..., EngineHarness], folder: Path
) -> None:
    one, other = journaled(), journaled()
    FIRST.wait(one, "s", start=True)
    FIRST.wait(one, "t", start=True)
    for name in ("s", "t"):
        safe(one, name)
    assert resume(SECOND, other).wait()
    safe(other)
    one.clock.now += 1_201.0
    wait_until(lambda: len(one.expired) == 2)
    wait_until(lambda: not files(folder / session_key("t", "")))
    settled(one)
    lose(other)
    assert resume(THIRD, other).wait()
    assert len(other.session("s").turns) == 3


def test_what_was_opened_anew_elsewhere_survives_the_end_here(
    journaled: Callable[..., EngineHarness],
) -> None:
    one, other = journaled(), journaled()
    FIRST.wait(one, "s", start=True)
    FIRST.wait(one, "t", start=True)
    safe(one)
    safe(one, "t")
    for name in ("s", "t"):
        SECOND.wait(other, name, start=True)
        safe(other, name)
    SECOND.wait(one, "s", end=True)
    one.clock.now += 1_201.0
    wait_until(lambda: one.expired == ["t"])
    settled(one)
    lose(other)
    for name in ("s", "t"):
        assert resume(THIRD, other, name).wait()
        assert len(other.session(name).turns) == 2


@pytest.mark.parametrize("busy", [False, True])
def test_the_end_of_a_stranger_deletes_nothing(
    journaled: Callable[..., EngineHarness], busy: bool
) -> None:
    harness = journaled()
    harness.ask("s", "What is it?", start=True, tenant="alice")
    safe(harness)
    alices = harness.submit("s", "Why?", tenant="alice") if busy else None
    assert failure(harness.submit("s", end=True, tenant="bob")) is ErrorCode.NOT_FOUND
    if alices is not None:
        assert alices.wait()
    wait_until(lambda: not harness.engine.statistics().sessions_open)
    settled(harness)
    harness.ask("s", start=True, tenant="alice", operation=RESUME)
    assert len(harness.session("s").turns) == 1 + busy
    # The owner's own END that is refused ends all.
    assert failure(harness.submit("s", "?", end=True, tenant="alice", history=[PastTurn("?", "!")]))
    wait_until(lambda: not harness.engine.statistics().sessions_open)
    settled(harness)
    again = harness.submit("s", start=True, tenant="alice", operation=RESUME)
    assert failure(again) is ErrorCode.NOT_FOUND


def test_pictures_that_no_session_has_do_not_stay(
    journaled: Callable[..., EngineHarness], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TIDY_SECONDS", 0.3)
    harness = journaled()
    THIRD.wait(harness, "open", start=True)
    assert failure(THIRD.submit(harness, "made up")) is ErrorCode.NOT_FOUND
    past = [PastTurn("", "", 9)]
    refused = harness.submit("refused", "?", PICTURES[:1], start=True, history=past)
    assert failure(refused) is ErrorCode.INVALID_ARG
    with harness.held_device() as device:
        cancelled = THIRD.submit(harness, "cancelled", start=True)
        device.wait_until_busy()
        harness.engine.cancel(cancelled.id)
        assert failure(cancelled) is ErrorCode.CANCELLED
    THIRD.wait(harness, "ended", start=True)
    harness.ask("ended", end=True)
    late = picture_path(session_key("ended", ""), "ab" * 32)
    harness.journal.keep(session_key("ended", ""), "ab" * 32, b"it came late")
    wait_until(lambda: (folder / late).exists())
    assert failure(THIRD.submit(harness, "open", history=past))
    key = session_key("open", "")
    wait_until(lambda: {path.relative_to(folder).parts[0] for path in files(folder)} == {key})
    safe(harness, "open")
    lose(harness)
    assert resume(SECOND, harness, "open").wait()


def test_what_is_used_without_an_answer_lives_as_long_in_the_journal(
    journaled: Callable[..., EngineHarness],
) -> None:
    harness = journaled(max_sessions=1)
    FIRST.wait(harness, "s", start=True)
    safe(harness)

    def pass_(seconds: float) -> None:
        harness.wall.now += seconds
        harness.clock.now += seconds

    uses: list[Callable[[], object]] = [
        lambda: failure(harness.submit("s", "?", history=[PastTurn("?", "!")])),  # refused
        lambda: harness.ask("s", start=True, operation=RESUME),
    ]
    for use in uses:
        pass_(1_000.0)
        assert use()
        safe(harness)
    FIRST.wait(harness, "other", start=True)
    assert harness.expired == ["s"]  # it hibernates
    pass_(1_000.0)
    safe(harness, "other")
    harness.ask("s", start=True, operation=RESUME)  # which is a use
    safe(harness)
    lose(harness)
    pass_(1_000.0)
    assert resume(SECOND, harness).wait()
    assert len(harness.session("s").turns) == 2
