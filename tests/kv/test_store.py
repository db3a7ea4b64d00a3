"""PageStore: reading back, export and import through another pool."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmserve.errors import WireError
from mmserve.kv.store import PageStore, page_bytes
from mmserve.kv.table import OutOfPages, PageTable
from mmserve.models.rope import rope_angles, rope_frequencies, rotate

LAYERS, HEADS, WIDTH = 2, 3, 8


def filled(slots: int = 11) -> tuple[PageTable, PageStore, torch.Tensor]:
    table, store = PageTable(LAYERS, HEADS, 60, 4), PageStore(60, 4, WIDTH)
    order = np.arange(slots, dtype=np.int32)
    rows = torch.randn(2, LAYERS, HEADS, slots, WIDTH, generator=torch.Generator().manual_seed(0))
    store.write(table.append("a", order, order + 5), rows[0], rows[1])
    return table, store, rows


def test_what_was_written_is_read() -> None:
    table, store, rows = filled()
    for layer in range(LAYERS):
        k, v = store.read(table.slots("a", layer))
        assert torch.equal(k, rows[0, layer])
        assert torch.equal(v, rows[1, layer])


def test_copies_may_overlap() -> None:
    _, store, _ = filled()
    slots = np.arange(6)
    before = store.read(slots)[0]
    store.copy(slots, (slots + 1) % 6)
    assert torch.equal(store.read((slots + 1) % 6)[0], before)


def test_memory_is_counted_in_pages() -> None:
    store = PageStore(3, 32, 64, torch.bfloat16)
    assert store.page_bytes == 2 * 32 * 64 * 2
    assert page_bytes(page_size=32, head_dim=64, dtype=torch.bfloat16) == store.page_bytes


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys [n, d] as a model rotates them."""
    return rotate(x[:, None], *rope_angles(positions, rope_frequencies(WIDTH, 1e4), torch.float32))[:, 0]


def test_rerotated_keys_are_those_of_their_new_positions() -> None:
    table, store, rows = filled()
    order = torch.arange(11)
    for layer, head in np.ndindex(LAYERS, HEADS):
        slots = table.slots("a", layer)[head]
        store.write(slots, rotated(rows[0, layer, head], order + 5), rows[1, layer, head])
    before = store.read(table.slots("a", 1))
    store.copy(*table.fork("a", "b"))
    store.copy(*table.keep("a", 1, 0, np.arange(0, 11, 2)))
    store.rerotate(table.rerotate("a", 1, 0, -np.arange(6, dtype=np.int32)), rope_frequencies(WIDTH, 1e4))
    store.rerotate(table.rerotate("a", 1, 1, 300), rope_frequencies(WIDTH, 1e4))
    for head, kept in ((0, order[::2]), (1, order), (2, order)):
        slots = table.slots("a", 1)[head]
        k, v = store.read(slots[slots >= 0])
        position = torch.from_numpy(table.position("a", 1, head))
        torch.testing.assert_close(k, rotated(rows[0, 1, head, kept], position), rtol=1e-5, atol=1e-5)
        assert torch.equal(v, rows[1, 1, head, kept])
    # the fork still shares what was not moved, and keeps what was
    assert all(torch.equal(a, b) for a, b in zip(store.read(table.slots("b", 1)), before, strict=True))


@pytest.mark.parametrize("page_size", [4, 8])
def test_an_export_arrives_whole_in_another_pool(page_size: int) -> None:
    table, store, _ = filled()
    store.copy(*table.keep("a", 1, 2, np.array([0, 3, 10])))
    store.copy(*table.keep("a", 0, 0, np.array([], np.int64)))
    export = store.export(table, "a")
    assert export.k.shape == (int(table.lengths("a").sum()), WIDTH)

    other, there = PageTable(LAYERS, HEADS, 60, page_size), PageStore(60, page_size, WIDTH)
    other.append("before", np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32))
    there.import_(other, "a", export)
    assert np.array_equal(other.lengths("a"), table.lengths("a"))
    for layer, head in np.ndindex(LAYERS, HEADS):
        assert np.array_equal(other.order("a", layer, head), table.order("a", layer, head))
        assert np.array_equal(other.position("a", layer, head), table.position("a", layer, head))
        mine, theirs = table.slots("a", layer)[head], other.slots("a", layer)[head]
        for a, b in zip(store.read(mine[mine >= 0]), there.read(theirs[theirs >= 0]), strict=True):
            assert torch.equal(a, b)
    again = there.export(other, "a")
    assert torch.equal(again.k, export.k)
    assert torch.equal(again.v, export.v)


def test_an_export_that_contradicts_itself_is_refused() -> None:
    table, store, _ = filled()
    export = store.export(table, "a")
    wrong = [
        replace(export, lengths=export.lengths[:1]),
        replace(export, lengths=-export.lengths),
        replace(export, order=export.order[1:]),
        replace(export, position=export.position[1:]),
        replace(export, k=export.k[1:]),
        replace(export, v=export.v[:, 1:]),
    ]
    for bad in wrong:
        with pytest.raises(WireError, match="Expected"):
            store.import_(table, "b", bad)
    assert "b" not in table


def test_an_import_that_does_not_fit_changes_nothing() -> None:
    table, store, _ = filled()
    export = store.export(table, "a")
    small, there = PageTable(LAYERS, HEADS, 10, 4), PageStore(10, 4, WIDTH)
    with pytest.raises(OutOfPages):
        there.import_(small, "a", export)
    assert small.free_pages == 10
