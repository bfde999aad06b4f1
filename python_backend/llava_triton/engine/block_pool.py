"""Which blocks of keys and values are free, who holds the others, and which can be shared."""

from __future__ import annotations

from collections import OrderedDict

BlockKey = bytes
"""Names a full block by everything its content depends on: a SHA-256 over its tokens, the pictures
among them, and the key of the block before it."""


class BlockPool:
    """Book-keeping of the blocks; the tensors are `Pages`'.

    A block is free, or held by one or more sessions. A full block may be cached under its key, so
    that sessions with the same prefix hold it together. A cached block that nobody holds is free,
    but keeps its content until it is given out again: the longest unused one goes first.

    Args:
        blocks: how many there are.
        cache_freed: whether a cached block that nobody holds can still be found.
    """

    def __init__(self, blocks: int, *, cache_freed: bool = True) -> None:
        self.blocks = blocks
        self._cache_freed = cache_freed
        self._blank = list(range(blocks))[::-1]
        self._remembered: OrderedDict[int, None] = OrderedDict()
        """Free blocks that are still cached, longest free first."""
        self._holders = [0] * blocks
        self.shared = 0
        """Blocks with more than one holder."""
        self._by_key: dict[BlockKey, int] = {}
        self._keys: dict[int, BlockKey] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._remembered)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of unspecified content, each held once; None if there are not so many."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._remembered.popitem(last=False)
                self.uncache(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def find(self, key: BlockKey) -> int | None:
        """The block cached under `key`, held once more; None if there is none."""
        block = self._by_key.get(key)
        if block is None:
            return None
        self._remembered.pop(block, None)
        self._holders[block] += 1
        self.shared += self._holders[block] == 2
        return block

    def hold(self, block: int) -> None:
        """Hold a block that somebody holds once more."""
        assert self._holders[block] > 0
        self._holders[block] += 1
        self.shared += self._holders[block] == 2

    def release(self, block: int) -> None:
        """Hold a block once less.

        Raises:
            ValueError: nobody holds it.
        """
        if self._holders[block] == 0:
            raise ValueError(f"block {block} is free already")
        self._holders[block] -= 1
        self.shared -= self._holders[block] == 1
        if self._holders[block] == 0:
            if not self._cache_freed:
                self.uncache(block)
            if block in self._keys:
                self._remembered[block] = None
            else:
                self._blank.append(block)

    def cache(self, block: int, key: BlockKey) -> None:
        """Let others find a full block; where the same content is cached already, nothing."""
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def uncache(self, block: int) -> None:
        """A block is about to be written: nobody may find it any more."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]

    def is_shared(self, block: int) -> bool:
        """Whether several sessions hold a block, so that none of them may write to it."""
        return self._holders[block] > 1

    def holders(self) -> list[int]:
        """How many sessions hold each block, for whoever checks the pool."""
        return list(self._holders)

    def key_of(self, block: int) -> BlockKey | None:
        """The key that a block is cached under."""
        return self._keys.get(block)

    def check(self) -> None:
        """For tests.

        Raises:
            AssertionError: what the pool knows contradicts itself.
        """
        free = [*self._blank, *self._remembered]
        assert sorted(free) == [block for block, count in enumerate(self._holders) if not count]
        assert self.shared == sum(count > 1 for count in self._holders)
        assert {block: key for key, block in self._by_key.items()} == self._keys
        assert all(block in self._keys for block in self._remembered)
        assert not any(block in self._keys for block in self._blank)
