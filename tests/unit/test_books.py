"""The block pool and the image store by themselves."""

from __future__ import annotations

from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import strategies as st

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.engine.block_pool import BlockPool
from llava_triton.engine.image_store import Image as StoredImage
from llava_triton.engine.image_store import ImageStore, digest_of
from tests.properties import given, settings

# The books themselves.


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("aafprw"), st.integers(0, 11))))
@settings(max_examples=300)
def test_block_pool(blocks: int, operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(blocks)
    holders: Counter[int] = Counter()
    published: dict[bytes, int] = {}
    freed: OrderedDict[int, None] = OrderedDict()
    """Free blocks that are published, longest free first."""
    for operation, number in operations:
        held = sorted(holders)
        key = bytes([number % 4])
        if operation == "a":
            count = number % 4
            blank = blocks - len(held) - len(freed)
            taken = pool.allocate(count)
            if count > blocks - len(held):
                assert taken is None
                continue
            assert taken is not None
            assert len(set(taken)) == count
            assert not set(taken) & set(held)
            lost = list(freed)[: max(0, count - blank)]
            assert set(lost) == set(taken) & set(freed)
            for block in lost:
                del freed[block]
                published = {key: each for key, each in published.items() if each != block}
            holders.update(taken)
        elif operation == "f":
            found = pool.find(key)
            assert found == published.get(key)
            if found is not None:
                freed.pop(found, None)
                holders[found] += 1
        elif operation == "p" and held:
            block = held[number % len(held)]
            pool.cache(block, key)
            if key not in published and block not in published.values():
                published[key] = block
        elif operation == "r" and held:
            block = held[number % len(held)]
            pool.release(block)
            holders[block] -= 1
            if not holders[block]:
                del holders[block]
                if block in published.values():
                    freed[block] = None
        elif operation == "w" and held:
            block = held[number % len(held)]
            pool.uncache(block)
            published = {key: each for key, each in published.items() if each != block}
        assert pool.holders() == [holders[block] for block in range(blocks)]
        assert pool.free == blocks - len(holders)
        assert pool.shared == sum(count > 1 for count in holders.values())
        assert all(pool.is_shared(block) == (holders[block] > 1) for block in range(blocks))


def test_a_free_block_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="free already"):
        BlockPool(3).release(1)


@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40),
)
@settings(max_examples=300)
def test_image_store(on_device: int, on_host: int, operations: list[tuple[bool, int]]) -> None:
    features = torch.arange(6.0).view(2, 3)
    one = features.numel() * features.itemsize
    store = ImageStore(lambda tensor: tensor.clone(), on_device * one, on_host * one)
    held: list[StoredImage] = []
    hits = 0
    for is_new, number in operations:
        kinds = {image.digest for image in held}
        if is_new:
            digest = digest_of(features + number)
            hits += digest in kinds
            if digest in kinds or (len(kinds) < on_device + on_host and on_device):
                held.append(store.hold(digest, features + number))
            else:
                before = (len(store), store.device_bytes, store.host_bytes, store.evictions)
                with pytest.raises(SessionError, match="memory for pictures is full") as caught:
                    store.hold(digest, features + number)
                assert caught.value.code is ErrorCode.UNAVAILABLE
                after = (len(store), store.device_bytes, store.host_bytes, store.evictions)
                assert after == before
        elif held:
            store.release(held.pop(number % len(held)))
        counts = Counter(image.digest for image in held)
        assert len(store) == len(counts)
        assert store.hits == hits
        assert store.device_bytes + store.host_bytes == len(counts) * one
        assert store.device_bytes <= on_device * one
        assert store.host_bytes <= on_host * one
        for image in held:
            assert image.holders == counts[image.digest]
            assert digest_of(image.features) == image.digest
