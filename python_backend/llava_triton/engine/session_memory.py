"""Keys and values of sessions: blocks that grow, are shared, and give way under pressure."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava_triton.engine.block_pool import BlockKey, BlockPool
from llava_triton.engine.image_store import salt_of
from llava_triton.engine.session import HostCopy, Session
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.kv_pages import Pages
from llava_triton.model.step import Transfer

log = logging.getLogger(__name__)


@dataclass
class MemoryCounters:
    """Counts since the engine started."""

    evicted_to_host: int = 0
    """Sessions whose keys and values went to host memory."""
    evicted_by_dropping: int = 0
    """Sessions whose keys and values were forgotten, to be computed again."""
    restored_from_host: int = 0
    restored_by_computing: int = 0
    """Sessions whose forgotten keys and values were needed again."""
    prefix_cache_blocks: int = 0
    """Prefix cache hits: blocks that a session shares instead of computing them."""
    blocks_copied: int = 0
    """Shared blocks that were copied because one of their sessions went on differently."""


class SessionMemory:
    """Gives sessions blocks and takes them away.

    Nothing is moved here: moves are listed, and the device thread does them in order before the
    step that follows. A block released now and given to another session is therefore written
    only after everything that was planned for it before.

    Args:
        pool: the blocks.
        pages: their content.
        host_bytes: budget for copies in host memory.
    """

    def __init__(self, pool: BlockPool, pages: Pages, host_bytes: int) -> None:
        self.pool = pool
        self.counters = MemoryCounters()
        self.host_bytes = 0
        """In use by copies."""
        self._pages = pages
        self.host_budget = host_bytes
        """Bytes of host memory that copies may take."""
        self.transfers: list[Transfer] = []
        """Moves to be done before the next step, in order."""
        self._on_host: OrderedDict[int, Session] = OrderedDict()
        """Sessions with a host copy by `id()`, longest there first."""
        self._on_device: OrderedDict[int, Session] = OrderedDict()
        """Sessions with blocks by `id()`, longest unused first."""

    def take_transfers(self) -> list[Transfer]:
        """The moves to be done before the next step; they are the caller's now."""
        transfers, self.transfers = self.transfers, []
        return transfers

    def on_device(self) -> Iterator[Session]:
        """The sessions that have blocks, longest unused first. None may gain or lose its blocks
        while the iterator is in use."""
        return iter(self._on_device.values())

    def on_host(self) -> Iterator[Session]:
        """The sessions with a copy in host memory, longest there first; as `on_device`."""
        return iter(self._on_host.values())

    def used(self, session: Session) -> None:
        """A turn of the session has ended: of all that have blocks it is the last to lose them."""
        if id(session) in self._on_device:
            self._on_device.move_to_end(id(session))

    def _note(self, session: Session) -> None:
        """Whether a session has blocks may have changed."""
        if session.key_values.blocks:
            self._on_device.setdefault(id(session), session)
        else:
            self._on_device.pop(id(session), None)

    def admit(self, session: Session) -> bool:
        """Make what a session remembers usable and give it blocks for all its tokens.

        Blocks that other sessions have computed for the same beginning are held, too.

        Returns:
            Whether there were enough free blocks; if not, nothing has changed.
        """
        kv = session.key_values
        if kv.host is not None and not self._restore(session):
            return False
        if kv.dropped:
            kv.dropped = False
            self.counters.restored_by_computing += 1
        self._reuse_prefix(session)
        return self.reserve(session, len(session.tokens))

    def reserve(self, session: Session, tokens: int) -> bool:
        """Give a session blocks for `tokens` tokens in all; False where there are too few.

        The tokens after those it remembers may be written then.
        """
        kv = session.key_values
        missing = max(0, _blocks_for(tokens) - len(kv.blocks))
        last, partial = divmod(kv.computed, BLOCK_TOKENS)
        copied = partial > 0 and self.pool.is_shared(kv.blocks[last])
        blocks = self.pool.allocate(missing + copied)
        if blocks is None:
            return False
        if copied:
            source, target = kv.blocks[last], blocks.pop()
            self.transfers.append(lambda: self._pages.copy(source, target))
            self.pool.release(source)
            kv.blocks[last] = target
            self.counters.blocks_copied += 1
        elif partial:
            self.pool.uncache(kv.blocks[last])
        kv.blocks.extend(blocks)
        self._note(session)
        return True

    def share(self, source: Session, copy: Session) -> None:
        """Let a new session remember what another one does of the tokens that both begin with.

        Args:
            source: may have a turn in flight.
            copy: its tokens are the first ones of the source's; nothing is remembered of them.
        """
        theirs, kv = source.key_values, copy.key_values
        computed = min(theirs.computed, len(copy.tokens))
        if not computed:
            return
        if theirs.host is not None:
            # The two share one copy in host memory. It counts for each, so that each may drop it.
            if self.host_bytes + theirs.host.bytes > self.host_budget:
                kv.dropped = True
                return
            kv.host = theirs.host
            self.host_bytes += kv.host.bytes
            self._on_host[id(copy)] = copy
        kv.blocks = theirs.blocks[: _blocks_for(computed)]
        for block in kv.blocks:
            self.pool.hold(block)
        kv.keys = theirs.keys[: computed // BLOCK_TOKENS]
        kv.computed = computed

    def extend(self, session: Session, count: int) -> None:
        """A step has computed so many tokens behind what the session remembered."""
        kv = session.key_values
        kv.computed += count
        while (len(kv.keys) + 1) * BLOCK_TOKENS <= kv.computed:
            key = block_key(session, kv.keys)
            self.pool.cache(kv.blocks[len(kv.keys)], key)
            kv.keys.append(key)

    def truncate(self, session: Session, length: int) -> None:
        """Forget the keys and values of every token from position `length` on."""
        kv = session.key_values
        kv.computed = min(kv.computed, length)
        del kv.keys[length // BLOCK_TOKENS :]
        keep = _blocks_for(length)
        for block in kv.blocks[keep:]:
            self.pool.release(block)
        del kv.blocks[keep:]
        self._note(session)
        if not kv.computed:
            self._drop_copy(session)

    def evict(self, session: Session) -> None:
        """Free a session's blocks; what they held goes to host memory, if that is large enough."""
        kv = session.key_values
        used = kv.blocks[: _blocks_for(kv.computed)]
        wanted = self._pages.host_bytes(len(used))
        if used and wanted <= self.host_budget:
            while self.host_bytes + wanted > self.host_budget:
                self._drop(next(self.on_host()))
            copy = HostCopy(wanted)
            self.transfers.append(lambda: _fill(copy, self._pages, used))
            self.host_bytes += wanted
            self._on_host[id(session)] = session
            self.counters.evicted_to_host += 1
            for block in kv.blocks:
                self.pool.release(block)
            kv.blocks, kv.host = array("i"), copy
            self._note(session)
        else:
            self._drop(session)

    def _drop(self, session: Session) -> None:
        self.truncate(session, 0)
        session.key_values.dropped = True
        self.counters.evicted_by_dropping += 1

    def forget(self, session: Session) -> None:
        """A step with this session failed: its blocks may hold anything. It is computed again."""
        for block in session.key_values.blocks:
            self.pool.uncache(block)
        self.truncate(session, 0)

    def _restore(self, session: Session) -> bool:
        """Bring back what is in host memory; False where there are too few blocks for it."""
        kv = session.key_values
        copy = kv.host
        assert copy is not None
        if copy.failed:
            self._drop(session)
            return True
        found: list[int] = []
        for key in kv.keys:
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
        fresh = self.pool.allocate(_blocks_for(kv.computed) - len(found))
        if fresh is None:
            for block in found:
                self.pool.release(block)
            return False
        first = len(found)
        if fresh:
            self.transfers.append(lambda: _bring_back(copy, self._pages, first, fresh))
        kv.blocks = array("i", found + fresh)
        self._note(session)
        for block, key in zip(kv.blocks, kv.keys, strict=False):
            self.pool.cache(block, key)
        self._drop_copy(session)
        self.counters.restored_from_host += 1
        return True

    def _reuse_prefix(self, session: Session) -> None:
        """Hold the blocks that are cached for a session's tokens beyond what it has itself.

        Never for all of them: the last one is computed, because its logits bring the next.
        """
        kv = session.key_values
        while (len(kv.keys) + 1) * BLOCK_TOKENS < len(session.tokens):
            key = block_key(session, kv.keys)
            block = self.pool.find(key)
            if block is None:
                return
            self.truncate(session, len(kv.keys) * BLOCK_TOKENS)
            kv.blocks.append(block)
            self._note(session)
            kv.keys.append(key)
            kv.computed = len(kv.keys) * BLOCK_TOKENS
            self.counters.prefix_cache_blocks += 1

    def _drop_copy(self, session: Session) -> None:
        copy = session.key_values.host
        if copy is not None:
            session.key_values.host = None
            self.host_bytes -= copy.bytes
            del self._on_host[id(session)]


def block_key(session: Session, keys: Sequence[BlockKey]) -> BlockKey:
    """The key of the block that follows those of `keys` in a session."""
    start = len(keys) * BLOCK_TOKENS
    end = start + BLOCK_TOKENS
    # The first block's key names the tenant, and so do all that follow from it.
    digest = hashlib.sha256(keys[-1] if keys else salt_of(session.tenant))
    digest.update(array("q", session.tokens[start:end]).tobytes())
    for span in session.pictures(start, end):
        digest.update(array("q", [span.start - start]).tobytes())
        digest.update(span.image.digest)
    return digest.digest()


def _blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _fill(copy: HostCopy, pages: Pages, blocks: Sequence[int]) -> None:
    try:
        copy.tensors = pages.to_host(blocks)
    except Exception:  # the step that follows belongs to others; `_bring_back` will say so
        copy.failed = True
        log.exception("keys and values could not be copied to host memory")


def _bring_back(copy: HostCopy, pages: Pages, first: int, blocks: Sequence[int]) -> None:
    if copy.tensors is None:
        raise RuntimeError("a session's keys and values were not copied to host memory")
    pages.from_host(copy.tensors, first, blocks)
