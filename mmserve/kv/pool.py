"""A fixed pool of page numbers with reference counts. Knows nothing about sequences, heads or tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int32]


class PagePool:
    """Every page is free or held by `refcount` >= 1 owners, never both.

    Free pages are known as maximal extents, ascending, so that taking pages does not depend on the size
    of the pool. Callers ask `free` first: `take` never fails.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = num_pages
        self._refcount: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self._starts, self._ends = _extents(np.arange(num_pages, dtype=np.int32))

    def take(self, count: int) -> Pages:
        """`count` free pages in few ascending runs: the smallest that fits, else the longest ones first."""
        assert count <= self.free, f"{count} pages asked for, {self.free} free"
        if count == 0:
            return np.empty(0, np.int32)
        lengths = self._ends - self._starts
        fitting = np.flatnonzero(lengths >= count)
        if len(fitting):
            pages = self._cut(int(fitting[np.argmin(lengths[fitting])]), count)
        else:
            longest = np.argsort(-lengths, kind="stable")
            whole = int(np.searchsorted(np.cumsum(lengths[longest]), count, side="right"))
            taken = [_span(self._starts[extent], self._ends[extent]) for extent in longest[:whole]]
            rest = count - sum(len(span) for span in taken)
            if rest:
                taken.append(self._cut(int(longest[whole]), rest))
            self._remove(longest[:whole])
            pages = np.concatenate(taken)
        self._refcount[pages] = 1
        self.free -= count
        return pages

    def share(self, pages: Pages) -> None:
        """One more owner for each of these held, distinct pages."""
        self._refcount[pages] += 1

    def release(self, pages: Pages) -> None:
        """One owner fewer for each of these distinct pages; those without owners become free."""
        self._refcount[pages] -= 1
        gone = np.sort(pages[self._refcount[pages] == 0])
        if len(gone):
            self.free += len(gone)
            self._add(*_extents(gone))

    def owners(self, pages: Pages) -> NDArray[np.int32]:
        """How many own each page."""
        return self._refcount[pages]

    def is_unshared(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of these held pages have a single owner."""
        unshared: NDArray[np.bool_] = self._refcount[pages] == 1
        return unshared

    def check(self, owned: list[Pages]) -> None:
        """The invariant, given the pages of every owner."""
        expected = np.zeros(self.num_pages, np.int32)
        for pages in owned:
            assert len(np.unique(pages)) == len(pages), "an owner holds a page twice"
            expected[pages] += 1
        assert np.array_equal(expected, self._refcount), "reference counts differ from what owners hold"
        free = np.flatnonzero(expected == 0).astype(np.int32)
        assert self.free == len(free), "the number of free pages is wrong"
        extents = _extents(free)
        assert np.array_equal(self._starts, extents[0]), "free extents begin elsewhere"
        assert np.array_equal(self._ends, extents[1]), "free extents end elsewhere"

    # inside

    def _cut(self, extent: int, count: int) -> Pages:
        """The first pages of an extent."""
        pages = _span(self._starts[extent], self._starts[extent] + count)
        self._starts[extent] += count
        if self._starts[extent] == self._ends[extent]:
            self._remove(np.array([extent]))
        return pages

    def _remove(self, extents: NDArray[np.int64]) -> None:
        self._starts, self._ends = np.delete(self._starts, extents), np.delete(self._ends, extents)

    def _add(self, starts: Pages, ends: Pages) -> None:
        """Put disjoint ascending extents back in order, joined to their neighbours."""
        where = np.searchsorted(self._starts, starts)
        all_starts, all_ends = np.insert(self._starts, where, starts), np.insert(self._ends, where, ends)
        apart = all_starts[1:] != all_ends[:-1]
        self._starts = all_starts[np.concatenate([[True], apart])]
        self._ends = all_ends[np.concatenate([apart, [True]])]


def _span(start: int, stop: int) -> Pages:
    return np.arange(start, stop, dtype=np.int32)


def _extents(pages: Pages) -> tuple[Pages, Pages]:
    """Begin and end of each run of consecutive numbers in these ascending pages."""
    breaks = np.flatnonzero(np.diff(pages) != 1)
    if len(pages) == 0:
        return pages.copy(), pages.copy()
    return pages[np.concatenate([[0], breaks + 1])], pages[np.concatenate([breaks, [-1]])] + np.int32(1)
