"""Pictures that the adapter fetches: how many lie in memory before room is taken for them."""

from __future__ import annotations

import asyncio

import pytest
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.pictures import FETCHED_AT_ONCE, Pictures


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
