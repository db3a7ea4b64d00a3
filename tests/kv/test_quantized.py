"""Quantized pages of answers: what comes in comes out, and pages that fill up equal those made at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.bench.geometry import geometry
from mmserve.errors import WireError
from mmserve.kernels.kv_codec.pages import Kind
from mmserve.kv.codec import QuantizedExport, parts_of, quantized, quantized_bytes, restored
from mmserve.kv.quantized import QuantizedStore, places_and_pages
from mmserve.kv.store import PageStore, page_bytes
from mmserve.kv.table import OutOfPages, PageTable

LAYERS, HEADS, SIZE, D = 2, 3, 4, 8
KINDS: list[Kind] = ["int8", "int4", "fp8"]


def make_store(kind: Kind, pages: int = 60, places: int = 3) -> QuantizedStore:
    return QuantizedStore(kind, PageTable(LAYERS, HEADS, pages, SIZE), places, D, torch.float32)


def make_floats(slots: int, seed: int = 0) -> tuple[PageTable, PageStore]:
    """A sequence "s" of so many slots in every head."""
    table, store = PageTable(LAYERS, HEADS, 100, SIZE), PageStore(100, SIZE, D)
    order = np.arange(slots, dtype=np.int32)
    where = table.append("s", order, order + 5)
    store.write(where, *(rows(seed + part, *where.shape, D) for part in (0, 1)))
    return table, store


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drop_some(table: PageTable, store: PageStore) -> None:
    """Heads of different lengths, one of them shorter than a page."""
    for (layer, head), kept in {(0, 1): [0, 3, 7, 8, 9], (1, 2): [1], (1, 0): list(range(8))}.items():
        store.copy(*table.keep("s", layer, head, np.array(kept)))


def same(found: QuantizedExport, expected: QuantizedExport) -> None:
    for name in ("lengths", "order", "position"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for one, other in zip(parts_of(found.pages).values(), parts_of(expected.pages).values(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.v, expected.v)


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 4, 5, 8, 18])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_imported_is_exported_bit_by_bit(kind: Kind, slots: int, evicted: bool) -> None:
    table, floats = make_floats(slots)
    if evicted and slots == 18:
        drop_some(table, floats)
    export = quantized(table, floats, "s", kind)
    assert export.kind == kind
    assert export.kv_bytes == quantized_bytes(table, floats, "s", kind)
    store = make_store(kind)
    store.import_("x", quantized(*make_floats(9, seed=7), "s", kind), 3)
    store.import_("s", export, 2)
    same(store.export("s"), export)
    store.table.check()


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_fill_up_one_by_one_equal_pages_quantized_at_once(kind: Kind, evicted: bool) -> None:
    table, floats = make_floats(18)
    if evicted:
        drop_some(table, floats)
    store = make_store(kind)
    store.import_("s", quantized(table, floats, "s", kind), 0)
    for step in range(2 * SIZE + 1):
        order = np.array([18 + step], np.int32)
        k, v = (rows(100 + 2 * step + part, LAYERS, HEADS, D) for part in (0, 1))
        floats.write(table.append("s", order, order)[..., 0], k, v)
        store.append("s", order, order)
        store.newest.write(store.newest_slots("s"), k, v)
    same(store.export("s"), quantized(table, floats, "s", kind))
    store.table.check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_restored_is_within_the_codecs_error_and_the_newest_page_exact(kind: Kind) -> None:
    table, floats = make_floats(18)
    drop_some(table, floats)
    expected, found = floats.export(table, "s"), restored(quantized(table, floats, "s", kind))
    assert np.array_equal(found.lengths, expected.lengths)
    for one, other in ((found.k, expected.k), (found.v, expected.v)):
        error = (one - other).abs()
        assert 0 < error.max() < (0.35 if kind == "int4" else 0.15)
    last = int(expected.lengths[0, 0])
    assert torch.equal(found.k[last - 2 : last], expected.k[last - 2 : last])


@pytest.mark.parametrize("other", ["int4", "fp8", None])
def test_what_another_codec_has_written_is_converted(other: Kind | None) -> None:
    table, floats = make_floats(11)
    drop_some(table, floats) if other == "fp8" else None
    export = floats.export(table, "s") if other is None else quantized(table, floats, "s", other)
    store = make_store("int8")
    store.import_("s", export, 0)
    if other is None:
        same(store.export("s"), quantized(table, floats, "s", "int8"))
    read = restored(store.export("s"))
    plain = floats.export(table, "s")
    assert np.array_equal(read.order, plain.order)
    assert (read.k - plain.k).abs().max() < 0.5


def test_places_and_pages_run_out_and_come_back() -> None:
    export = quantized(*make_floats(9), "s", "int8")
    store = make_store("int8", pages=3 * LAYERS * HEADS, places=1)
    store.import_("a", export, 0)
    with pytest.raises(OutOfPages, match="place"):
        store.import_("b", export, 0)
    store.release("a")
    store.release("unknown")
    with pytest.raises(OutOfPages):
        store.import_("a", export, 40)
    assert (store.free_places, store.table.used_pages) == (1, 0)
    store.table.reserve("a", 12)
    store.import_("a", export, 3)
    same(store.export("a"), export)


def test_parts_that_do_not_fit_are_refused() -> None:
    table, floats = make_floats(9)
    export, store = quantized(table, floats, "s", "int8"), make_store("int8")
    wrong = QuantizedExport(
        lengths=export.lengths,
        order=export.order,
        position=export.position,
        pages=export.pages,
        k=export.k[1:],
        v=export.v,
    )
    with pytest.raises(WireError):
        store.import_("s", wrong, 0)
    assert store.table.used_pages == 0


# how many requests a decode worker holds


def capacity(kind: Kind | None, memory: int, slots: int) -> float:
    """Requests of ov-mini that fit into so much memory, in whole pages."""
    text = geometry("ov-mini").text
    heads, d = text["num_hidden_layers"] * text["num_key_value_heads"], text["head_dim"]
    pages_each = heads * -(-slots // 32)
    if kind is None:
        return memory // page_bytes(page_size=32, head_dim=d, dtype=torch.bfloat16) / pages_each
    places, pages = places_and_pages(memory, 64, kind, heads, 32, d, torch.bfloat16)
    assert places >= pages / pages_each, "every request has a place"
    return pages / pages_each


@pytest.mark.parametrize(("kind", "factor"), [("int8", 1.85), ("fp8", 1.85), ("int4", 3.2)])
def test_so_many_more_requests_fit_into_the_same_memory(kind: Kind, factor: float) -> None:
    slots = 32 * 196 + 1 + 24 + 64  # of a video, its newline, text, and what an answer takes at first
    for memory in (1 << 26, 1 << 27, 1 << 28):
        assert capacity(kind, memory, slots) >= factor * capacity(None, memory, slots), memory
