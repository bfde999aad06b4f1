"""The journal in a bucket: moto's server in the place of S3."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from llava_triton.journal.background import Background
from llava_triton.journal.reading import read_session
from llava_triton.journal.store import Store, StoreError
from llava_triton.journal.writer import ElsewhereError, Log
from tests.unit.test_journal import KEY, NAME, NEXT, Hands

BUCKET = "conversations"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What an operator sets, and boto3 to look into the bucket."""
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    yield client
    moto.stop()


def test_a_session_in_a_bucket(bucket: Any) -> None:
    store, background = Store(f"s3://{BUCKET}/some/prefix"), Background("test")
    hands = Hands(store, background)
    log = Log(KEY)
    hands.pictures.keep(KEY, NAME, b"a picture")
    assert hands.write(log) is None
    assert hands.write(log, **NEXT) is None
    found = background.run(read_session(store, KEY, 0.0)).result()
    assert found is not None
    assert found.conversation.tokens == [1, 5, 5, 5, 2, 3, 4]
    there = [each["Key"] for each in bucket.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert all(each.startswith(f"some/prefix/{KEY}/") for each in there)
    assert len(there) == 3
    # A number is taken once, and a fork has its own copy of the pictures.
    late = Log(KEY, generation=log.generation, number=1, pictures={NAME})
    assert isinstance(hands.write(late, **NEXT), ElsewhereError)
    fork = hands.writer.fork(log, "f" * 64)
    assert hands.write(fork, session=fork.key) is None
    # A bucket's times are whole seconds.
    for each in (log, fork):
        hands.writer.forget(each, time.time() + 1.0)
    hands.until(lambda: "Contents" not in bucket.list_objects_v2(Bucket=BUCKET))
    background.close()


def test_a_bucket_that_is_not_there_is_a_store_that_is_down(bucket: Any) -> None:
    background = Background("test")
    store = Store("s3://nobodys/prefix")
    assert background.run(store.read("x")).result() is None
    with pytest.raises(StoreError, match="404"):
        background.run(store.create("x", b"")).result()
    with pytest.raises(StoreError):
        background.run(store.folders()).result()
    background.close()
