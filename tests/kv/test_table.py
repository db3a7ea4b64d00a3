"""PageTable: single operations by example; any sequence of them is in tests/property."""

from __future__ import annotations

import numpy as np
import pytest

from mmserve.kv.table import NO_ORDER, IntArray, OutOfPages, PageTable


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


def flattened(table: PageTable, name: str, layer: int, head: int) -> list[int]:
    """The slots of a head as its runs list them."""
    first, length = table.runs(name)
    pairs = zip(first[:, layer, head].tolist(), length[:, layer, head].tolist(), strict=True)
    return [slot for start, count in pairs for slot in range(start, start + count)]


def test_what_was_reserved_at_once_is_one_run() -> None:
    table = PageTable(2, 3, 100, 4)
    table.reserve("a", 12)
    assert len(table.runs("a").first) == 0
    slots = table.append("a", span(0, 5), span(0, 5))
    table.append("b", span(0, 2), span(0, 2))
    runs = table.runs("a")
    assert runs.first.tolist() == slots[None, :, :, 0].tolist()
    assert (np.diff(runs.first[0]) == runs.first[0, 0, 1] - runs.first[0, 0, 0]).all()
    assert (runs.length == 5).all()
    table.append("a", span(5, 12), span(5, 12))
    assert table.runs("a").length.tolist() == np.full((1, 2, 3), 12).tolist()
    assert table.runs("a").first.base is runs.first.base  # nothing was laid out anew


def test_runs_break_where_any_head_does() -> None:
    table = PageTable(1, 2, 100, 4)
    table.append("a", span(0, 8), span(0, 8))
    table.append("a", span(8, 13), span(8, 13))
    assert table.runs("a").length.tolist() == [[[8, 8]], [[5, 5]]]
    table.keep("a", 0, 1, np.array([0, 1, 12]))
    assert table.runs("a").length.tolist() == [[[8, 3]], [[5, 0]]]
    for head in range(2):
        slots = table.slots("a", 0)[head]
        assert flattened(table, "a", 0, head) == slots[slots >= 0].tolist()


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


def test_heads_of_a_single_layer_may_differ() -> None:
    table = PageTable(1, 2, 20, 4)
    table.append("a", span(0, 6), span(0, 6))
    table.keep("a", 0, 1, np.array([5]))
    assert table.orders("a", 0).tolist() == [list(range(6)), [5, *[NO_ORDER] * 5]]
    table.append("a", ints(6), ints(6))
    assert table.order("a", 0, 1).tolist() == [5, 6]


def test_shared_pages_outlive_their_sequence_and_begin_another() -> None:
    table = PageTable(2, 2, 40, 4)
    slots = table.append("a", span(0, 10), span(5, 15))
    pages = table.share("a", 0, 2)
    assert pages.shape == (2, 2, 2)
    assert not table.is_unshared(pages).any()
    table.release("a")
    assert table.used_pages == pages.size
    assert table.is_unshared(pages).all()
    table.check([pages])

    table.adopt("b", pages, span(0, 8), span(5, 13))
    assert table.lengths("b").tolist() == [[8, 8], [8, 8]]
    assert table.slots("b", 1).tolist() == slots[1, :, :8].tolist()
    assert table.position("b", 1, 0).tolist() == list(range(5, 13))
    new = table.append("b", ints(8), ints(13))
    assert not np.isin(new // 4, pages).any()
    table.keep("b", 0, 0, np.arange(3))
    table.check([pages])
    table.drop(pages)
    table.check()
    table.release("b")
    assert table.free_pages == 40


def test_only_full_pages_of_like_heads_are_shared() -> None:
    table = PageTable(1, 2, 40, 4)
    table.append("a", span(0, 10), span(0, 10))
    with pytest.raises(AssertionError, match="full"):
        table.share("a", 1, 2)
    table.keep("a", 0, 0, np.delete(np.arange(10), 5))
    with pytest.raises(AssertionError, match="different slots"):
        table.share("a", 0, 2)
    pages = table.share("a", 0, 1)  # what comes after is not looked at
    table.check([pages])


def test_layers_can_be_appended_to_apart_and_turn_out_alike() -> None:
    table = PageTable(3, 2, 60, 4)
    table.reserve("a", 12)
    table.append("a", span(0, 3), span(0, 3))
    assert table.append("a", span(3, 10), span(3, 10), range(1)).shape == (1, 2, 7)
    assert table.lengths("a").tolist() == [[10, 10], [3, 3], [3, 3]]
    tail = table.append("a", ints(4, 9), ints(4, 9), range(1, 3))
    assert tail.tolist() == [[row[3:5].tolist() for row in table.slots("a", layer)] for layer in (1, 2)]
    assert table.tail("a", 7, range(1)).tolist() == [table.slots("a", 0)[:, 3:].tolist()]
    assert table.order("a", 0, 1).tolist() == list(range(10))
    assert table.order("a", 2, 0).tolist() == [0, 1, 2, 4, 9]
    assert table.orders("a", 1).tolist() == [[0, 1, 2, 4, 9]] * 2
    table.unite("a")
    before = table.used_pages
    table.trim("a", 2, range(1, 3))
    assert table.used_pages == before - 4, "7 of 12 slots take 2 pages of 3"
    table.check()
    assert table.missing_pages("a", 2) == 0
    assert table.missing_pages("a", 4) == 2 * 3
    table.append("a", ints(20), ints(15))
    assert table.lengths("a").tolist() == [[11, 11], [6, 6], [6, 6]]
    assert [table.order("a", layer, 0)[-1] for layer in range(3)] == [20] * 3
    table.check()
    table.release("a")
    assert table.used_pages == 0


def test_layers_that_were_appended_alike_are_alike_again() -> None:
    table = PageTable(2, 1, 60, 4)
    for layers in (range(1), range(1, 2)):
        table.append("a", span(0, 5), span(0, 5), layers)
        table.append("a", span(5, 9), span(5, 9), layers)
    with pytest.raises(AssertionError, match="full"):
        table.share("a", 0, 3)
    table.unite("a")
    assert table.orders("a", 1).tolist() == [list(range(9))]
    table.append("a", ints(9), ints(9))
    assert table.tail("a", 2).tolist() == [table.slots("a", layer)[:, 8:].tolist() for layer in range(2)]
    table.check()


def test_rerotate_moves_to_fresh_pages_and_notes_the_positions() -> None:
    table = PageTable(2, 2, 40, 4)
    slots = table.append("a", span(0, 6), span(0, 6))
    table.fork("a", "b")
    turns = table.rerotate("a", 1, None, ints(0, 0, -1, -1, -2, -2))
    assert turns.source.tolist() == slots[1].flatten().tolist()
    assert turns.delta.tolist() == [0, 0, -1, -1, -2, -2] * 2
    assert not np.isin(turns.destination, turns.source).any()
    assert table.slots("a", 1).flatten().tolist() == turns.destination.tolist()
    for head in range(2):
        assert table.position("a", 1, head).tolist() == [0, 1, 1, 2, 2, 3]
        assert table.position("a", 0, head).tolist() == list(range(6))
        assert table.position("b", 1, head).tolist() == list(range(6))
    assert table.rerotate("a", 0, 1, 3).delta.tolist() == [3] * 6
    table.check()


def test_rerotate_without_room_changes_nothing() -> None:
    table = PageTable(1, 2, 7, 4)
    table.append("a", span(0, 6), span(0, 6))
    with pytest.raises(OutOfPages, match="Expected 4 free KV pages, but got 3"):
        table.rerotate("a", 0, None, 1)
    assert table.position("a", 0, 0).tolist() == list(range(6))
    assert len(table.rerotate("a", 0, 0, 1).source) == 6
    table.check()


def test_a_slot_may_have_three_positions() -> None:
    table = PageTable(2, 2, 60, 4, axes=3)
    positions = np.arange(18, dtype=np.int32).reshape(6, 3)
    table.append("a", span(0, 6), positions)
    table.fork("a", "b")
    table.keep("a", 0, 1, np.array([1, 5]))
    table.append("a", ints(6), ints(9, 9, 9).reshape(1, 3))
    assert table.position("a", 0, 1).tolist() == [[3, 4, 5], [15, 16, 17], [9, 9, 9]]
    assert table.position("b", 0, 1).tolist() == positions.tolist()
    table.rerotate("b", 1, 0, 2)
    assert table.position("b", 1, 0).tolist() == (positions + 2).tolist()
    with pytest.raises(AssertionError, match="shape"):
        table.append("a", ints(7), ints(10))
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    order, position = ([read("a", *head) for head in heads] for read in (table.order, table.position))
    table.restore("c", table.lengths("a"), np.concatenate(order), np.concatenate(position))
    assert all(np.array_equal(table.position("c", *head), table.position("a", *head)) for head in heads)
    table.check()
