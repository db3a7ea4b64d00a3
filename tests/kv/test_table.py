"""PageTable: single operations by example, and any sequence of operations against a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmserve.kv.pool import PagePool
from mmserve.kv.table import NO_ORDER, IntArray, Moves, OutOfPages, PageTable, SlotArray


def ints(*values: int) -> IntArray:
    return np.array(values, np.int32)


def span(start: int, stop: int) -> IntArray:
    return np.arange(start, stop, dtype=np.int32)


def test_a_prompt_lies_contiguous_in_every_head() -> None:
    table = PageTable(2, 3, 100, 4)
    slots = table.append("a", span(0, 10), span(0, 10))
    assert slots.shape == (2, 3, 10)
    assert (np.diff(slots) == 1).all()
    assert len(np.unique(slots)) == slots.size
    assert table.used_pages == table.pages_for(10) == 2 * 3 * 3
    assert table.used_pages + table.free_pages == 100


def test_reserved_pages_keep_later_slots_contiguous() -> None:
    table = PageTable(1, 2, 100, 4)
    table.reserve("a", 12)
    table.append("b", span(0, 4), span(0, 4))
    first = table.append("a", span(0, 5), span(0, 5))
    second = table.append("a", span(5, 12), span(5, 12))
    assert (np.diff(np.concatenate([first, second], axis=2)) == 1).all()


def test_running_out_changes_nothing() -> None:
    table = PageTable(1, 2, 6, 4)
    table.append("a", span(0, 5), span(0, 5))
    assert table.can_append("a", 7)
    assert not table.can_append("a", 8)
    assert not table.can_append(None, 5)
    with pytest.raises(OutOfPages, match="Expected 4 free KV pages, but got 2"):
        table.append("b", span(0, 5), span(0, 5))
    with pytest.raises(OutOfPages):
        table.append("a", span(5, 13), span(5, 13))
    assert "b" not in table
    assert table.lengths("a").tolist() == [[5, 5]]
    assert table.free_pages == 2
    table.check()


def test_keep_drops_slots_of_one_head_only() -> None:
    table = PageTable(2, 2, 40, 4)
    slots = table.append("a", span(10, 19), span(0, 9))
    moves = table.keep("a", 1, 0, np.array([1, 8]))
    assert moves.source.tolist() == slots[1, 0, [1, 8]].tolist()
    assert table.lengths("a").tolist() == [[9, 9], [2, 9]]
    assert table.order("a", 1, 0).tolist() == [11, 18]
    assert table.position("a", 1, 0).tolist() == [1, 8]
    assert table.order("a", 0, 0).tolist() == list(range(10, 19))
    assert table.slots("a", 1)[0].tolist() == [*moves.destination.tolist(), *[-1] * 7]
    assert table.orders("a", 1)[0].tolist() == [11, 18, *[NO_ORDER] * 7]
    appended = table.append("a", ints(30), ints(9))
    assert table.tail("a", 1).tolist() == appended.tolist()
    assert table.order("a", 1, 0).tolist() == [11, 18, 30]
    table.check()


def test_keep_everything_moves_nothing() -> None:
    table = PageTable(1, 1, 4, 4)
    table.append("a", span(0, 9), span(0, 9))
    assert len(table.keep("a", 0, 0, np.arange(9)).source) == 0
    assert table.free_pages == 1


def test_keep_compacts_in_place_only_what_is_private() -> None:
    table = PageTable(1, 1, 5, 4)
    first = table.append("a", span(0, 16), span(0, 16))
    table.append("b", span(0, 1), span(0, 1))
    moves = table.keep("a", 0, 0, np.arange(1, 8))
    assert moves.destination.tolist() == first[0, 0, :7].tolist()
    assert table.free_pages == 2
    table.append("b", span(1, 12), span(1, 12))
    table.release("a")
    table.fork("b", "c")
    table.append("d", span(0, 8), span(0, 8))
    with pytest.raises(OutOfPages, match="to keep"):
        table.keep("b", 0, 0, np.arange(5))
    assert table.lengths("b").tolist() == [[12]]
    table.check()


def test_fork_shares_full_pages_and_copies_the_last() -> None:
    table = PageTable(1, 2, 20, 4)
    parent = table.append("a", span(0, 6), span(0, 6))
    moves = table.fork("a", "b")
    assert table.used_pages == 2 * 2 + 2
    assert moves.source.tolist() == parent[0, :, 4:].flatten().tolist()
    assert table.slots("b", 0)[:, :4].tolist() == parent[0, :, :4].tolist()
    assert not np.isin(table.append("b", ints(6), ints(6)), table.append("a", ints(6), ints(6))).any()
    table.release("a")
    assert table.used_pages == 4
    table.release("b")
    assert table.free_pages == 20
    table.check()


def test_restore_recreates_lengths_orders_and_positions() -> None:
    table = PageTable(2, 2, 40, 4)
    lengths = ints(3, 0, 5, 1).reshape(2, 2)
    slots = table.restore("a", lengths, span(0, 9), span(20, 29))
    assert len(np.unique(slots)) == 9
    assert table.lengths("a").tolist() == lengths.tolist()
    assert table.order("a", 1, 0).tolist() == [3, 4, 5, 6, 7]
    assert table.position("a", 1, 1).tolist() == [28]
    assert table.slots("a", 1)[0].tolist() == slots[3:8].tolist()
    table.check()


def test_the_pool_prefers_the_smallest_run_that_fits() -> None:
    pool = PagePool(10)
    pool.take(10)
    pool.release(ints(0, 1, 2, 3, 5, 6, 9))
    assert pool.take(2).tolist() == [5, 6]
    assert pool.take(5).tolist() == [0, 1, 2, 3, 9]
    assert pool.take(0).tolist() == []


NAMES = ["a", "b", "c"]
LAYERS, HEADS, PAGE_SIZE, PAGES = 2, 2, 4, 40
Content = dict[tuple[int, int], list[tuple[int, int, int]]]


class TableMachine(RuleBasedStateMachine):
    """A store of plain integers beside the table: every sequence must always read back what was put in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(LAYERS, HEADS, PAGES, PAGE_SIZE)
        self.store = np.zeros(PAGES * PAGE_SIZE, np.int64)
        self.model: dict[str, Content] = {}
        self.next = 1

    @initialize(spread=st.integers(0, 20))
    def start_anywhere(self, spread: int) -> None:
        self.next += spread

    def copy(self, moves: Moves) -> None:
        self.store[moves.destination] = self.store[moves.source]

    @rule(name=st.sampled_from(NAMES), count=st.integers(0, 9))
    def append(self, name: str, count: int) -> None:
        order, position = span(self.next, self.next + count), span(0, count)
        fits = self.table.can_append(name, count)
        try:
            slots = self.table.append(name, order, position)
        except OutOfPages:
            assert not fits
            return
        assert fits
        new = np.arange(count * LAYERS * HEADS).reshape(LAYERS, HEADS, count) + self.next * 1000
        self.store[slots] = new
        content = self.model.setdefault(name, {(la, h): [] for la in range(LAYERS) for h in range(HEADS)})
        for (layer, head), rows in content.items():
            rows += zip(order.tolist(), position.tolist(), new[layer, head].tolist(), strict=True)
        self.next += count

    @rule(name=st.sampled_from(NAMES), count=st.integers(0, 9))
    def reserve(self, name: str, count: int) -> None:
        if name in self.model and self.table.can_append(name, count):
            self.table.reserve(name, count)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        layer, head = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, HEADS - 1))
        rows = self.model[name][layer, head]
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))), bool)
        chosen: SlotArray = np.flatnonzero(mask)
        try:
            self.copy(self.table.keep(name, layer, head, chosen))
        except OutOfPages:
            return
        self.model[name][layer, head] = [rows[i] for i in chosen]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), child=st.sampled_from(NAMES))
    def fork(self, data: st.DataObject, child: str) -> None:
        parent = data.draw(st.sampled_from(sorted(self.model)))
        if child in self.model:
            return
        try:
            self.copy(self.table.fork(parent, child))
        except OutOfPages:
            assert child not in self.table
            return
        self.model[child] = {key: list(rows) for key, rows in self.model[parent].items()}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.table.release(name)
        del self.model[name]

    @invariant()
    def pages_are_conserved(self) -> None:
        self.table.check()
        assert self.table.free_pages + self.table.used_pages == PAGES
        assert self.model or self.table.used_pages == 0

    @invariant()
    def contents_survive(self) -> None:
        for name, content in self.model.items():
            lengths = self.table.lengths(name)
            for (layer, head), rows in content.items():
                assert lengths[layer, head] == len(rows)
                slots = self.table.slots(name, layer)[head]
                assert (slots[len(rows) :] == -1).all()
                found = zip(
                    self.table.order(name, layer, head).tolist(),
                    self.table.position(name, layer, head).tolist(),
                    self.store[slots[: len(rows)]].tolist(),
                    strict=True,
                )
                assert list(found) == rows


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
