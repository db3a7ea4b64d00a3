"""The KV of prompts' beginnings, kept so that the next prompt that begins alike need not compute it.

Holds shares of a `PageTable`'s pages. Knows nothing about requests, and not what makes two prompts
alike: that is their `Identity`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mmserve.kv.identity import Identity, orders_of, positions_of
from mmserve.kv.pool import Pages
from mmserve.kv.table import PageTable

_Tenant = bytes


@dataclass(slots=True, eq=False)
class _Block:
    """One page per layer and head, with what has to be equal for a hit."""

    key: bytes
    parent: _Block | None
    root: tuple[bytes, bytes]
    content: bytes
    row: int  # in the cache's array of pages
    children: int = 0

    @property
    def tenant(self) -> _Tenant:
        return _tenant_of(self.root)


def _tenant_of(root: tuple[bytes, bytes]) -> _Tenant:
    """Whose the salt is: its part before the first slash, as in `request.tenant_of`."""
    return root[0].partition(b"/")[0]


class PrefixCache:
    """A tree of blocks of one page per head; a hash finds a block, comparing its content makes it a hit.

    Least recently used blocks go first, of the tenant that holds most: who floods the cache evicts nobody
    who holds less. Whoever touches a block touches its ancestors after it, so a
    child always stands before its parent in `_blocks`, and the first block is a leaf.
    """

    def __init__(self, table: PageTable, max_pages: int, page_bytes: int) -> None:
        self._table = table
        self._page_bytes = page_bytes
        self._block_pages = table.layers * table.kv_heads
        self._max_blocks = max_pages // self._block_pages
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # oldest first
        self._shares: Counter[_Tenant] = Counter()  # blocks by tenant
        self._rows: list[_Block] = []  # the block of each row of `_pages`
        self._pages: Pages = np.zeros((self._max_blocks, table.layers, table.kv_heads), np.int32)
        self._is_held = np.zeros(table.num_pages, np.bool_)
        self.queries = 0
        self.hits = 0
        self.hit_slots = 0
        self.evicted_blocks = 0

    @property
    def held_pages(self) -> int:
        return len(self._rows) * self._block_pages

    @property
    def evictable_pages(self) -> int:
        """Pages that `evict` can free now; the others are in use by sequences too."""
        return int(self._table.is_unshared(self.pages).sum())

    @property
    def bytes(self) -> int:
        return self.held_pages * self._page_bytes

    @property
    def pages(self) -> Pages:
        """All pages held, [blocks, layers, kv_heads]."""
        return self._pages[: len(self._rows)]

    def holds(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of these pages the cache holds a share of."""
        held: NDArray[np.bool_] = self._is_held[pages]
        return held

    def match(self, identity: Identity, limit_slots: int) -> int:
        """Slots of the longest cached prefix, whole pages and at most `limit_slots`."""
        self.queries += 1
        return len(self._walk(identity, limit_slots)) * self._table.page_size

    def busy_pages(self, identity: Identity, slots: int) -> int:
        """Pages of a cached prefix that sequences use: taking them makes no other page unavailable."""
        blocks = self._walk(identity, slots)
        return int((~self._table.is_unshared(self._pages[[block.row for block in blocks]])).sum())

    def take(self, sequence: str, identity: Identity, slots: int) -> None:
        """Create `sequence` with these first `slots`, as `match` found them just now."""
        blocks = self._walk(identity, slots)
        assert slots > 0, "there is something to take"
        assert len(blocks) * self._table.page_size == slots, "the cache has changed since it was asked"
        pages = self._pages[[block.row for block in blocks]]  # [blocks, layers, heads]
        rows = identity.rows[:slots]
        order, position = orders_of(rows), positions_of(rows, self._table.axes)
        self._table.adopt(sequence, np.ascontiguousarray(np.moveaxis(pages, 0, 2)), order, position)
        self._touch(blocks)
        self.hits += 1
        self.hit_slots += slots

    def insert(self, sequence: str, identity: Identity, slots: int) -> None:
        """Share the full pages of a sequence's first `slots` that are not cached yet.

        The sequence's slots are those of `identity`, and no head has lost any.
        """
        size, rows = self._table.page_size, identity.rows[:slots]
        assert len(rows) == slots, "the identity is of fewer slots"
        held = self._table.order(sequence, 0, 0)[:slots]
        assert np.array_equal(held, orders_of(rows)), "the identity is another sequence's"
        blocks = self._walk(identity, slots)
        self._touch(blocks)
        known, wanted = len(blocks), slots // size
        wanted = known + self._make_room(wanted - known, blocks, _tenant_of(identity.root))
        if wanted == known:
            return
        chain = identity.chain(size)
        for index in range(known, wanted):
            # a different content under this hash stays where it is
            if chain[index] in self._blocks:
                break
            parent = blocks[-1] if blocks else None
            block = _Block(
                chain[index], parent, identity.root, identity.content(index, size), len(self._rows)
            )
            if parent is not None:
                parent.children += 1
            self._rows.append(block)
            self._blocks[block.key] = block
            self._shares[block.tenant] += 1
            blocks.append(block)
        pages = self._table.share(sequence, known, len(blocks) - known)
        self._pages[len(self._rows) - pages.shape[2] : len(self._rows)] = np.moveaxis(pages, 2, 0)
        self._is_held[pages] = True
        self._touch(blocks)

    def evict(self, pages: int) -> int:
        """Free at least this many pages if possible; returns how many became free.

        Blocks that sequences use free nothing and stay, unless an unused ancestor is needed.
        """
        counts = self._table.is_unshared(self.pages).sum(axis=(1, 2)).tolist()
        total, freed, victims = sum(counts), 0, []
        in_turn = list(self._in_turn())
        for block in in_turn:
            if freed >= min(pages, total):
                break
            if block.children == 0 and counts[block.row]:
                freed += counts[block.row]
                self._leave_parent(block)
                victims.append(block)
        gone = {block.key for block in victims}
        for block in in_turn:
            if freed >= min(pages, total):
                break
            if block.key not in gone:
                freed += counts[block.row]
                self._leave_parent(block)
                victims.append(block)
        self._remove(victims)
        return freed

    def forget(self, identity: Identity) -> None:
        """Give up the blocks of a prompt and all that follow them, so that its pages are its own again."""
        path = self._walk(identity, len(identity.rows))
        if not path:
            return
        self._leave_parent(path[0])
        gone = {id(block): block for block in path}
        for block in reversed(self._blocks.values()):  # parents before their children
            if block.parent is not None and id(block.parent) in gone:
                gone[id(block)] = block
        self._remove(list(gone.values()))

    def clear(self) -> None:
        """Forget everything; this counts as no eviction."""
        self._table.drop(self.pages)
        self._is_held[:] = False
        self._blocks.clear()
        self._shares.clear()
        self._rows.clear()

    # inside

    def _walk(self, identity: Identity, limit_slots: int) -> list[_Block]:
        """The cached blocks of a prompt's beginning, each compared and not only found."""
        size, found = self._table.page_size, list[_Block]()
        for index, key in enumerate(islice(identity.chain(size), limit_slots // size)):
            block = self._blocks.get(key)
            if block is None or block.parent is not (found[-1] if found else None):
                break
            if block.root != identity.root or block.content != identity.content(index, size):
                break
            found.append(block)
        return found

    def _touch(self, blocks: list[_Block]) -> None:
        for block in reversed(blocks):
            self._blocks.move_to_end(block.key)

    def _make_room(self, wanted: int, keep: Collection[_Block], tenant: _Tenant) -> int:
        """Evict the oldest blocks, but not these; how many of `wanted` new ones of a tenant then fit."""
        lacking = min(wanted + len(self._rows) - self._max_blocks, len(self._rows) - len(keep))
        victims: list[_Block] = []
        if lacking > 0:
            kept = {block.key for block in keep}
            free = (block for block in self._in_turn(tenant, wanted) if block.key not in kept)
            victims = list(islice(free, lacking))
        for block in victims:
            self._leave_parent(block)
        self._remove(victims)
        return min(wanted, self._max_blocks - len(self._rows))

    def _in_turn(self, growing: _Tenant = b"", by: int = 0) -> Iterator[_Block]:
        """All blocks as they should go, children before parents. One tenant is about to hold more."""
        if len(self._shares) == 1:
            yield from self._blocks.values()
            return
        queues: dict[_Tenant, deque[_Block]] = {}
        for block in self._blocks.values():
            queues.setdefault(block.tenant, deque()).append(block)
        # most blocks first, then a number so that nothing else is compared
        loads = [
            (-len(queue) - by * (tenant == growing), number, queue)
            for number, (tenant, queue) in enumerate(queues.items())
        ]
        heapify(loads)
        while loads:
            load, number, queue = loads[0]
            yield queue.popleft()
            if queue:
                heapreplace(loads, (load + 1, number, queue))
            else:
                heappop(loads)

    def _leave_parent(self, block: _Block) -> None:
        if block.parent is not None:
            block.parent.children -= 1

    def _remove(self, blocks: list[_Block]) -> None:
        """Forget blocks and drop their pages; their children are among them."""
        pages = self._pages[[block.row for block in blocks]]
        self._table.drop(pages)
        self._is_held[pages] = False
        for block in blocks:
            del self._blocks[block.key]
            self._shares[block.tenant] -= 1
            if not self._shares[block.tenant]:
                del self._shares[block.tenant]
            # the last row fills the gap
            last = self._rows.pop()
            if last is not block:
                self._pages[block.row] = self._pages[last.row]
                self._rows[block.row] = last
                last.row = block.row
        self.evicted_blocks += len(blocks)
