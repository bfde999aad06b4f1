"""What one tenant can tell of another: nothing, whatever both say and show."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from llava_triton.client import Session
from llava_triton.contract import protocol
from llava_triton.contract.errors import ErrorCode, SessionError, error_from_text
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.engine.block_pool import BlockPool
from llava_triton.server.triton_server import TritonServer
from tests.server.test_conversations import never_seen_picture
from tests.small_engine import PICTURES, Alone, Ask, Start, failure
from tests.triton import answer_of, inputs

SECRET = Ask("The number of the account is 12 34 56 78. What is it? " * 3, (PICTURES[0],))


# In the engine.


@pytest.mark.parametrize("ended", [False, True], ids=["open", "ended"])
def test_equal_beginnings_of_two_tenants_are_not_shared(
    start: Start, alone: Alone, ended: bool
) -> None:
    harness = start()
    tenants = ("alice", "bob", NO_TENANT)
    for tenant in tenants:
        text, final = SECRET.wait(harness, tenant or "nobody", start=True, tenant=tenant)
        assert text == alone(SECRET)[0]
        assert final.num_cached_tokens == 0
        if ended:
            harness.engine.close(tenant or "nobody")
    now = harness.engine.statistics()
    assert (now.prefix_cache_blocks, now.blocks_shared, now.image_hits) == (0, 0, 0)
    assert now.images == (0 if ended else len(tenants))
    for tenant in tenants:  # with himself everybody shares
        _, final = SECRET.wait(harness, f"{tenant} again", start=True, tenant=tenant)
        assert final.num_cached_tokens > final.num_input_tokens / 2


def test_the_last_picture_that_fits_is_refused_to_whoever_brings_it(start: Start) -> None:
    """Also where another tenant has shown it: that it takes no room would tell."""
    harness = start(pictures=1, host_blocks=0)
    SECRET.wait(harness, "a", start=True, tenant="alice")
    assert failure(SECRET.submit(harness, "b", start=True, tenant="bob")) is ErrorCode.UNAVAILABLE
    SECRET.wait(harness, "again", start=True, tenant="alice")


@pytest.mark.parametrize("stranger", ["bob", NO_TENANT], ids=["another", "nobody"])
@pytest.mark.parametrize("owner", ["alice", "a" * 128, NO_TENANT], ids=["one", "long", "nobody"])
def test_a_session_is_unknown_to_other_tenants(
    start: Start, alone: Alone, owner: str, stranger: str
) -> None:
    if owner == stranger:
        return
    harness = start()
    said = Ask("The account is 12 34 56 78.")
    said.wait(harness, "opened", start=True, tenant=owner)
    errors = []
    for session_id in ("opened", "no such session"):
        with pytest.raises(SessionError) as caught:
            Ask("What did I say?").wait(harness, session_id, tenant=stranger)
        assert caught.value.code is ErrorCode.NOT_FOUND
        errors.append(caught.value.sentence.replace(session_id, ""))
    assert errors[0] == errors[1]
    with pytest.raises(SessionError, match="'opened' is taken; choose a random one") as refused:
        Ask("Hello!").wait(harness, "opened", start=True, tenant=stranger)
    assert refused.value.code is ErrorCode.INVALID_ARG
    again = Ask("What did I say?")
    assert again.wait(harness, "opened", tenant=owner)[0] == alone(said, again)[-1]


def test_a_stranger_waits_for_no_turn_of_the_owner_and_takes_no_place(start: Start) -> None:
    harness = start(max_queued_turns_per_session=2)
    with harness.held_device() as device:
        running = Ask("Hello!").submit(harness, "s", start=True, tenant="alice")
        device.wait_until_busy()
        for _ in range(5):
            stranger = Ask("Hello?").submit(harness, "s", tenant="bob")
            assert failure(stranger) is ErrorCode.NOT_FOUND
        opening = Ask("Hello?").submit(harness, "s", start=True, tenant="bob")
        assert failure(opening) is ErrorCode.INVALID_ARG
        behind = Ask("And?").submit(harness, "s", tenant="alice")
        assert not device.going
    running.wait()
    behind.wait()


def test_a_session_whose_sequence_a_stranger_has_ended_is_not_kept(start: Start) -> None:
    """Triton ends a sequence by its ID alone: its owner cannot reach it any more."""
    harness = start()
    Ask("Hello!").wait(harness, "s", start=True, tenant="alice")
    ending = harness.submit("s", end=True, tenant="bob")
    assert failure(ending) is ErrorCode.NOT_FOUND
    harness.assert_nothing_is_held()


def test_strangers_do_not_keep_a_session_alive(start: Start) -> None:
    harness = start(session_idle_seconds=100.0)
    Ask("Hello!").wait(harness, "s", start=True, tenant="alice")
    harness.clock.now += 60.0
    assert failure(Ask("Hello?").submit(harness, "s", tenant="bob")) is ErrorCode.NOT_FOUND
    harness.clock.now += 60.0
    assert failure(Ask("Hello?").submit(harness, "s", tenant="alice")) is ErrorCode.NOT_FOUND
    assert harness.expired == ["s"]


def test_what_only_ended_sessions_said_can_be_kept_from_being_found(
    start: Start, alone: Alone
) -> None:
    harness = start(cache_freed_blocks=False)
    SECRET.wait(harness, "one", start=True)
    _, shared = SECRET.wait(harness, "two", start=True)
    assert shared.num_cached_tokens > 0  # open at the same time
    for name in ("one", "two"):
        harness.engine.close(name)
    text, final = SECRET.wait(harness, "three", start=True)
    assert text == alone(SECRET)[0]
    assert final.num_cached_tokens == 0
    harness.evict_idle("three")
    harness.poison_free_blocks()
    assert Ask("?").wait(harness, "three")[0] == alone(SECRET, Ask("?"))[-1]


def test_a_pool_that_forgets_what_nobody_holds() -> None:
    pool = BlockPool(2, cache_freed=False)
    taken = pool.allocate(1)
    assert taken is not None
    pool.cache(taken[0], b"key")
    assert pool.find(b"key") == taken[0]
    pool.release(taken[0])
    assert pool.find(b"key") == taken[0]  # held once
    for _ in range(2):
        pool.release(taken[0])
    assert pool.find(b"key") is None
    assert pool.free == 2


# A tenant's name.


@pytest.mark.parametrize("name", ["a", "A" * 128, "arn:aws:iam::1:role/x", "a.b+c@d.example", "="])
def test_names_of_tenants(name: str) -> None:
    assert protocol.parse_tenant({protocol.TENANT: name}) == name
    assert protocol.parse_tenant({"other": name}) == NO_TENANT


@pytest.mark.parametrize(
    "name", ["", "a" * 129, "a b", "é", "a;b", "a,b", "a\n", "\0", 7, True, None, ["a"], "\ud800"]
)
def test_what_is_no_name_of_a_tenant(name: Any) -> None:
    with pytest.raises(SessionError, match="1 to 128 letters") as caught:
        protocol.parse_tenant({protocol.TENANT: name})
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


# Through the real server.


@pytest.mark.parametrize("over", ["http", "grpc", "grpc stream"])
def test_two_tenants_at_the_door(server: TritonServer, over: str) -> None:
    url = server.http_url if over == "http" else server.grpc_url
    picture, question = never_seen_picture(), f"{uuid.uuid4().hex * 3} What is it?"

    def answer(tenant: str | None) -> tuple[str, int, int]:
        with Session.open(url, tenant=tenant) as session:
            if over != "grpc stream":
                told = session.ask(question, image=picture, max_tokens=8)
                return told.text, told.num_cached_tokens, told.num_input_tokens
            stream = session.stream(question, image=picture, max_tokens=8)
            text = "".join(stream)
            return text, stream.answer.num_cached_tokens, stream.answer.num_input_tokens

    tenants = ["alice", "bob", None]
    first = [answer(tenant) for tenant in tenants]
    again = [answer(tenant) for tenant in tenants]
    assert len({text for text, _, _ in [*first, *again]}) == 1
    # No more than the template's beginning, of those who were here before under the same name.
    assert all(cached < 16 for _, cached, _ in first)
    assert all(cached > tokens / 2 for _, cached, tokens in again)


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_another_s_session_is_unknown_at_the_door(
    over: str, http_client: Any, grpc_client: Any
) -> None:
    session = uuid.uuid4().hex
    client, module = {
        "http": (http_client, tritonclient.http),
        "grpc": (grpc_client, tritonclient.grpc),
    }[over]

    def ask(text: str | None, **options: Any) -> Any:
        made = inputs(module, text, None, {"max_tokens": 8})
        return answer_of(client.infer("llava", made, sequence_id=session, **options))

    alice = {"tenant": "alice"}
    ask("Hello!", sequence_start=True, parameters=alice)
    for parameters in ({"tenant": "bob"}, None):
        with pytest.raises(InferenceServerException) as caught:
            ask("What did I say?", parameters=parameters)
        assert error_from_text(caught.value.message()).code is ErrorCode.NOT_FOUND
    for name in ("", "a b", "x" * 200, 7):
        with pytest.raises(InferenceServerException, match="1 to 128 letters") as caught:
            ask("Hello?", parameters={"tenant": name})
        assert error_from_text(caught.value.message()).code is ErrorCode.INVALID_ARG
    assert ask("And now?", parameters=alice).num_cached_tokens > 0
    assert ask(None, sequence_end=True, parameters=alice).finish_reason == "closed"


@pytest.mark.parametrize("tenant", ["", "a b", "x" * 129])
def test_a_client_refuses_what_is_no_name(server: TritonServer, tenant: str) -> None:
    for url in (server.http_url, server.grpc_url):
        with pytest.raises(SessionError, match="1 to 128 letters"):
            Session.open(url, tenant=tenant)
