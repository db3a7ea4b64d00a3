"""Decodes that read only some pages, against bounds and attention worked out slot by slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.cpu import CpuAttention
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.attention.selection import MIN_PAGES, PageSelection, Quest
from mmserve.errors import BadRequest
from mmserve.kernels.paged_decode import cpu as decode_kernel
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable

LAYERS, KV_HEADS, GROUP, WIDTH, PAGE_SIZE = 3, 2, 3, 8, 4


@pytest.fixture(params=[PagedAttention, CpuAttention, CudaAttention], ids=["reference", "cpu", "cuda"])
def kind(request: pytest.FixtureRequest) -> type[PagedAttention]:
    found: type[PagedAttention] = request.param
    return found


class Engine:
    """Sequences of random keys and values, and what a decode of theirs should read."""

    def __init__(self, kind: type[PagedAttention]) -> None:
        self.kind = kind
        self.table = PageTable(LAYERS, KV_HEADS, 600, PAGE_SIZE)
        self.store = PageStore(600, PAGE_SIZE, WIDTH)
        self.rng = torch.Generator().manual_seed(0)
        self.selections: dict[str, PageSelection] = {}

    def add(self, name: str, slots: int, quest: Quest | None) -> None:
        order = np.arange(slots, dtype=np.int32)
        where = self.table.append(name, order, order)
        self.store.write(where, *(self.random(*where.shape, WIDTH) for _ in range(2)))
        if quest is not None:
            self.selections[name] = PageSelection(quest, self.table, self.store, name)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def keep(self, name: str, layer: int, head: int, slots: range) -> None:
        self.store.copy(*self.table.keep(name, layer, head, np.array(slots, np.int64)))

    def step(self, quests: dict[str, Quest | None]) -> None:
        """One decode of each sequence; raises where its output is not that of the pages it should read."""
        batch = []
        for at, name in enumerate(quests):
            order = self.table.order(name, 0, 0)[-1:] + np.int32(1)
            self.table.append(name, order, order)
            batch.append(SequenceRows(name, at, at + 1, selection=self.selections.get(name)))
        q, k, v = (self.random(LAYERS, len(batch), h, WIDTH) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
        attention = self.kind(self.table, self.store, batch)
        for layer in range(LAYERS):
            found = attention.attend(layer, q[layer], k[layer], v[layer])
            for at, (name, quest) in enumerate(quests.items()):
                expected = self.expected(name, quest, layer, q[layer, at])
                torch.testing.assert_close(found[at], expected, rtol=1e-5, atol=1e-6)

    def expected(self, name: str, quest: Quest | None, layer: int, q: Tensor) -> Tensor:
        out = []
        for head in range(KV_HEADS):
            slots = self.table.slots(name, layer)[head]
            keys, values = self.store.read(slots[slots >= 0])
            queries = q[head * GROUP : (head + 1) * GROUP]
            read = list(range(len(keys)))
            if quest is not None and layer >= quest.dense_layers:
                read = slots_of(pages_of(quest, keys, queries), len(keys))
            weights = torch.softmax(queries @ keys[read].T * WIDTH**-0.5, -1)
            out.append(weights @ values[read])
        return torch.cat(out)


def pages_of(quest: Quest, keys: Tensor, queries: Tensor) -> list[int]:
    """By the paper's bound, channel by channel; the newest page always."""
    newest = (len(keys) - 1) // PAGE_SIZE
    bounds = []
    for page in range(newest):
        own = keys[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        largest, smallest = own.max(0).values, own.min(0).values
        bounds.append(max(float(torch.maximum(q * largest, q * smallest).sum()) for q in queries))
        assert bounds[-1] >= float((queries @ own.T).max()) - 1e-5
    most = max(MIN_PAGES, quest.budget // PAGE_SIZE) - 1
    return [*sorted(sorted(range(newest), key=lambda page: -bounds[page])[:most]), newest]


def slots_of(pages: list[int], slots: int) -> list[int]:
    return [slot for slot in range(slots) if slot // PAGE_SIZE in pages]


def test_decodes_read_the_pages_with_the_largest_bounds(kind: type[PagedAttention]) -> None:
    engine, quest = Engine(kind), Quest(budget=20, dense_layers=1)
    quests = {"some": quest, "all": None, "short": quest}
    for (name, of), slots in zip(quests.items(), (61, 30, 6), strict=True):
        engine.add(name, slots, of)
    # pages become full, and a short sequence long enough
    for _ in range(22):
        engine.step(quests)


def test_heads_may_have_lost_different_slots(kind: type[PagedAttention]) -> None:
    engine, quest = Engine(kind), Quest(budget=12, dense_layers=0)
    engine.add("a", 50, quest)
    engine.keep("a", 1, 0, range(0, 50, 3))
    engine.keep("a", 2, 1, range(45, 50))
    for _ in range(14):
        engine.step({"a": quest})


def test_bounds_are_taken_anew_where_pages_hold_other_slots(kind: type[PagedAttention]) -> None:
    engine, quest = Engine(kind), Quest(budget=12, dense_layers=0)
    engine.add("a", 64, quest)
    for round_ in range(3):
        engine.step({"a": quest})
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                engine.keep("a", layer, head, range(round_, 50 - round_))
    engine.step({"a": quest})


def test_with_everything_all_pages_are_read(kind: type[PagedAttention]) -> None:
    engine = Engine(kind)
    engine.add("a", 90, Quest.everything())
    engine.step({"a": None})


def test_only_what_is_selected_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, quest = Engine(CpuAttention), Quest(budget=16, dense_layers=0)
    engine.add("a", 200, quest)
    read = []
    decode = decode_kernel.paged_decode

    def counted(*arguments: Tensor, scale: float) -> Tensor:
        read.append(int(arguments[4].sum()))
        return decode(*arguments, scale=scale)

    monkeypatch.setattr("mmserve.attention.cpu.paged_decode", counted)
    engine.step({"a": quest})
    assert max(read) <= KV_HEADS * quest.budget


def test_the_bounds_of_a_page_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, quest = Engine(CpuAttention), Quest(budget=16, dense_layers=0)
    engine.add("a", 200, quest)
    engine.step({"a": quest})
    keys, taken = engine.store.k, []

    class Keys:
        """Notes which pages are looked up."""

        def __getitem__(self, pages: Tensor) -> Tensor:
            taken.append(len(pages))
            return keys[pages]

        def __getattr__(self, name: str) -> object:
            return getattr(keys, name)

    selection = engine.selections["a"]
    for _ in range(8):
        order = engine.table.order("a", 0, 0)[-1:] + np.int32(1)
        engine.table.append("a", order, order)
        selection.begin_step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.store, "k", Keys())
            for layer in range(LAYERS):
                selection.select(layer, engine.random(KV_HEADS * GROUP, WIDTH))
    # two pages of each head have become full
    assert sum(taken) == 2 * LAYERS * KV_HEADS


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"budget": "many"}, {"dense_layers": -1}])
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(BadRequest, match="Expected"):
        Quest(**wrong)
