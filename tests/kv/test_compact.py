"""`PageTable.compact`: slots that nobody will see any more leave, in every layer and head at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable

LAYERS, HEADS, PAGE_SIZE, WIDTH = 2, 3, 4, 8


def orders(start: int, stop: int) -> IntArray:
    return np.arange(start, stop, dtype=np.int32)


def filled(slots: int, reserved: int = 0) -> tuple[PageTable, PageStore, torch.Tensor]:
    """A sequence "a" whose slots are numbered in their contents, [layers, heads, slots, width]."""
    table, store = PageTable(LAYERS, HEADS, 200, PAGE_SIZE), PageStore(200, PAGE_SIZE, WIDTH)
    table.reserve("a", reserved)
    contents = torch.randn(LAYERS, HEADS, slots, WIDTH)
    store.write(table.append("a", orders(0, slots), orders(100, 100 + slots)), contents, -contents)
    return table, store, contents


@pytest.mark.parametrize("start", [0, 3, 9])
@pytest.mark.parametrize("reserved", [0, 30])
def test_survivors_move_to_the_front_in_every_head(start: int, reserved: int) -> None:
    table, store, contents = filled(17, reserved)
    kept = np.array([i for i in (0, 2, 3, 5, 9, 12, 16) if i >= start], np.int64)
    held, version = table.used_pages, table.version("a")
    store.copy(*table.compact("a", start, kept))
    table.check()
    left = [*range(start), *kept.tolist()]
    assert (table.lengths("a") == len(left)).all()
    assert (table.used_pages, table.version("a")) == (held, version), "pages stay for what comes next"
    for layer, head in np.ndindex(LAYERS, HEADS):
        assert table.order("a", layer, head).tolist() == left
        assert table.position("a", layer, head).tolist() == [100 + i for i in left]
        k, v = store.read(table.slots("a", layer)[head])
        assert torch.equal(k, contents[layer, head, left])
        assert torch.equal(v, -contents[layer, head, left])


def test_nothing_moves_where_nothing_lies_between() -> None:
    table, _, _ = filled(11)
    moves = table.compact("a", 5, np.array([5, 6], np.int64))
    assert len(moves.source) == len(moves.destination) == 0
    assert (table.lengths("a") == 7).all()


def test_what_comes_next_goes_where_the_dropped_slots_were() -> None:
    table, store, contents = filled(13, 40)
    store.copy(*table.compact("a", 1, np.array([12], np.int64)))
    before = table.used_pages
    table.append("a", orders(13, 25), orders(113, 125))
    assert table.used_pages == before
    assert table.order("a", 1, 2).tolist() == [0, 12, *range(13, 25)]
    table.trim("a", 3)
    table.check()
    assert table.used_pages == table.pages_for(14 + 3)
    k, _ = store.read(table.slots("a", 0)[1, :2])
    assert torch.equal(k, contents[0, 1, [0, 12]])


def test_a_shared_page_is_never_written() -> None:
    table, _, _ = filled(11)
    pages = table.share("a", 0, 2)
    with pytest.raises(AssertionError, match="shared"):
        table.compact("a", 7, np.array([8], np.int64))
    table.compact("a", 8, np.array([9], np.int64))
    table.check([pages])


def test_heads_that_differ_cannot_be_compacted_together() -> None:
    table, store, _ = filled(9)
    store.copy(*table.keep("a", 1, 1, np.array([0, 4])))
    with pytest.raises(AssertionError, match="different slots"):
        table.compact("a", 0, np.array([1], np.int64))
