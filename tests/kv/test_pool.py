"""PagePool: which pages it hands out, and its extents against a plain set of free pages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmserve.kv.pool import PagePool, Pages


def test_the_pool_prefers_the_smallest_run_that_fits() -> None:
    pool = PagePool(10)
    pool.take(10)
    pool.release(np.array([0, 1, 2, 3, 5, 6, 9], np.int32))
    assert pool.take(2).tolist() == [5, 6]
    assert pool.take(5).tolist() == [0, 1, 2, 3, 9]
    assert pool.take(0).tolist() == []


def test_released_pages_join_their_neighbours() -> None:
    pool = PagePool(8)
    pages = pool.take(8)
    for part in (pages[[1, 5]], pages[[3, 7, 0]], pages[[6, 2, 4]]):
        pool.release(part)
    assert pool.take(8).tolist() == list(range(8))


def test_a_shared_page_is_free_after_its_last_owner() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    pool.share(pages[:1])
    assert pool.is_unshared(pages).tolist() == [False, True, True]
    pool.release(pages)
    pool.check([pages[:1]])
    pool.release(pages[:1])
    assert pool.free == 4


@given(st.lists(st.integers(0, 12), max_size=40))
def test_extents_agree_with_what_is_owned(counts: list[int]) -> None:
    pool, owned = PagePool(24), list[Pages]()
    for count in counts:
        if count <= pool.free:
            free = set(range(24)) - {page for pages in owned for page in pages.tolist()}
            pages = pool.take(count)
            assert set(pages.tolist()) <= free
            runs = 1 + int((np.diff(pages) != 1).sum()) if count else 0
            longest = max(
                (len(run) for run in "".join(" x"[p in free] for p in range(24)).split()), default=0
            )
            assert runs <= 1 or longest < count
            owned.append(pages)
        else:
            pool.release(owned.pop(count % len(owned)))
        pool.check(owned)
