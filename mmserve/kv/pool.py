"""A fixed pool of page numbers with reference counts. Knows nothing about sequences, heads or tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int32]


class PagePool:
    """Every page is free or held by `refcount` >= 1 owners, never both.

    Callers ask `free` first: `take` never fails.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = num_pages
        self._refcount: NDArray[np.int32] = np.zeros(num_pages, np.int32)

    def take(self, count: int) -> Pages:
        """`count` free pages in few ascending runs: the smallest that fits, else the longest ones first."""
        assert count <= self.free, f"{count} pages asked for, {self.free} free"
        free = np.flatnonzero(self._refcount == 0).astype(np.int32)
        edges = np.concatenate([[0], np.flatnonzero(np.diff(free) != 1) + 1, [len(free)]])
        starts, lengths = edges[:-1], np.diff(edges)
        fitting = np.flatnonzero(lengths >= count)
        if len(fitting):
            start = starts[fitting[np.argmin(lengths[fitting])]]
            pages = free[start : start + count]
        else:
            longest = np.argsort(-lengths, kind="stable")
            runs = longest[: np.searchsorted(np.cumsum(lengths[longest]), count) + 1]
            pages = np.concatenate([free[starts[run] : starts[run] + lengths[run]] for run in runs])[:count]
        self._refcount[pages] = 1
        self.free -= count
        return pages

    def share(self, pages: Pages) -> None:
        """One more owner for each of these held, distinct pages."""
        self._refcount[pages] += 1

    def release(self, pages: Pages) -> None:
        """One owner fewer for each of these distinct pages; those without owners become free."""
        self._refcount[pages] -= 1
        self.free += int((self._refcount[pages] == 0).sum())

    def is_private(self, pages: Pages) -> bool:
        """True when nobody else owns any of these pages."""
        return bool((self._refcount[pages] == 1).all())

    def check(self, owned: list[Pages]) -> None:
        """The invariant, given the pages of every owner."""
        expected = np.zeros(self.num_pages, np.int32)
        for pages in owned:
            assert len(np.unique(pages)) == len(pages), "an owner holds a page twice"
            expected[pages] += 1
        assert np.array_equal(expected, self._refcount), "reference counts differ from what owners hold"
        assert self.free == int((expected == 0).sum()), "the number of free pages is wrong"
