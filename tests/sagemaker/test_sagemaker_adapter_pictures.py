"""Pictures and videos that the adapter fetches: how many lie in memory before room is taken for
them, and what the models get."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llava_sagemaker.adapter.chat_messages import read_conversation
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.json_body import LongString
from llava_sagemaker.adapter.pictures import FETCHED_AT_ONCE, Pictures, Video, named_pictures
from llava_sagemaker.adapter.turns import packed


def test_few_pictures_of_a_request_are_fetched_at_a_time() -> None:
    under_way, most = 0, 0
    taken: list[int] = []

    async def fetch(url: str) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(3):
            await asyncio.sleep(0)  # lets the others go on
        under_way -= 1
        return url.encode()

    urls = [f"https://example.com/{number}" for number in range(30)]
    loaded = asyncio.run(Pictures(fetch, limit=64).load(urls, taken.append))
    assert loaded == [url.encode() for url in urls]
    assert sum(taken) == sum(map(len, urls))
    assert most == FETCHED_AT_ONCE


def test_where_there_is_no_room_no_more_are_fetched() -> None:
    fetched = 0

    async def fetch(url: str) -> bytes:
        nonlocal fetched
        fetched += 1
        for _ in range(3):
            await asyncio.sleep(0)  # lets the others go on
        return b"a picture"

    def take(size: int) -> None:
        raise AdapterError(413, "body_too_large", "no room")

    urls = [f"https://example.com/{number}" for number in range(30)]
    with pytest.raises(AdapterError, match="no room"):
        asyncio.run(Pictures(fetch, limit=64).load(urls, take))
    assert fetched <= 2 * FETCHED_AT_ONCE


def loaded(named: list[Any]) -> list[bytes]:
    """What the models get of it."""

    async def fetch(url: str) -> bytes:
        return f"file of {url}".encode()

    elements = asyncio.run(Pictures(fetch, limit=64).load(named, lambda size: None))
    return [b"".join(packed([each]).pieces)[4:] for each in elements]


def test_videos_are_marked_however_they_are_named() -> None:
    long = LongString((b"data:video/mp4;base64,AA", b"AA"))
    named = ["data:image/png;base64,AA", Video("https://a.b/c"), Video("AAAA", 3), Video(long)]
    assert loaded(named) == [
        b"data:image/png;base64,AA",
        b"data:video/*,file of https://a.b/c",
        b"data:video/*;num_frames=3,AAAA",
        b"data:video/*,data:video/mp4;base64,AAAA",
    ]
    fields = {"image": "a", "video": ["b", "c"], "text": "d"}
    assert named_pictures(fields) == ["a", Video("b"), Video("c")]
    assert fields == {"text": "d"}


def test_videos_of_messages_keep_their_places() -> None:
    def part(kind: str, url: str) -> dict[str, Any]:
        return {"type": kind, kind: {"url": url}}

    content = [
        {"type": "text", "text": "ab"},
        part("video_url", "https://a.b/c"),
        {"type": "text", "text": "c"},
        part("image_url", "https://a.b/d"),
        {"type": "text", "text": "d"},
    ]
    asked = read_conversation([{"role": "user", "content": content}], 8)
    assert asked.images == (Video("https://a.b/c", 8), "https://a.b/d")
    assert asked.positions == (2, 3)
    others = read_conversation([{"role": "user", "content": content}], 7)
    assert asked.picture_digests[1] == others.picture_digests[1]
    assert asked.picture_digests[0] != others.picture_digests[0]
    with pytest.raises(AdapterError, match="message 1 has a video_url that is no URL") as caught:
        read_conversation([{"role": "user", "content": [part("video_url", "clip.mp4")]}])
    assert caught.value.code == "video_invalid"
