"""PagedAttention against dense masked attention, one head and one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.cpu import CpuAttention
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable

LAYERS, KV_HEADS, GROUP, WIDTH, PAGE_SIZE = 2, 2, 3, 8, 4


Kind = type[PagedAttention]


@pytest.fixture(params=[PagedAttention, CpuAttention], ids=["reference", "cpu"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


class Engine:
    """A table, a store, and a dense record of everything that was ever appended."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        self.kind = kind
        self.table = PageTable(LAYERS, KV_HEADS, 400, PAGE_SIZE)
        self.store = PageStore(400, PAGE_SIZE, WIDTH)
        self.generator = torch.Generator().manual_seed(seed)
        self.keys: dict[tuple[str, int, int], dict[int, Tensor]] = {}
        self.values: dict[tuple[str, int, int], dict[int, Tensor]] = {}

    def rows(self, count: int, heads: int) -> Tensor:
        return torch.randn(LAYERS, count, heads, WIDTH, generator=self.generator)

    def step(self, work: dict[str, IntArray], tensors: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Append rows of these orders to each sequence and attend: [layers, rows, q_heads, d]."""
        count = sum(map(len, work.values()))
        heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        q, k, v = tensors or tuple(self.rows(count, h) for h in heads)
        batch, start = [], 0
        for name, order in work.items():
            self.table.append(name, order, order)
            batch.append(SequenceRows(name, start, start + len(order)))
            for layer, head in np.ndindex(LAYERS, KV_HEADS):
                for i, place in enumerate(order.tolist(), start):
                    self.keys.setdefault((name, layer, head), {})[place] = k[layer, i, head]
                    self.values.setdefault((name, layer, head), {})[place] = v[layer, i, head]
            start += len(order)
        attention = self.kind(self.table, self.store, batch)
        found = torch.stack(
            [attention.attend(layer, q[layer], k[layer], v[layer]) for layer in range(LAYERS)]
        )
        torch.testing.assert_close(found, self.dense(work, q), rtol=1e-5, atol=1e-6)
        return found

    def dense(self, work: dict[str, IntArray], q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        rows = [(name, place) for name, order in work.items() for place in order.tolist()]
        for layer, head in np.ndindex(LAYERS, KV_HEADS * GROUP):
            for i, (name, place) in enumerate(rows):
                stored = self.keys[name, layer, head // GROUP]
                seen = [key for key in stored if key <= place]
                k = torch.stack([stored[key] for key in seen])
                v = torch.stack([self.values[name, layer, head // GROUP][key] for key in seen])
                out[layer, i, head] = (q[layer, i, head] @ k.T * WIDTH**-0.5).softmax(-1) @ v
        return out

    def keep(self, name: str, layer: int, head: int, slots: list[int]) -> None:
        order = self.table.order(name, layer, head)
        self.store.copy(*self.table.keep(name, layer, head, np.array(slots, np.int64)))
        for stored in (self.keys[name, layer, head], self.values[name, layer, head]):
            for place in set(stored) - set(order[slots].tolist()):
                del stored[place]


def orders(start: int, stop: int, step: int = 1) -> IntArray:
    return np.arange(start, stop, step, dtype=np.int32)


def test_prompts_and_decodes_of_a_batch_each_see_their_own_past(kind: Kind) -> None:
    engine = Engine(kind)
    engine.step({"a": orders(0, 9), "b": orders(0, 30, 3)})
    engine.step({"a": orders(9, 10), "c": orders(0, 5), "b": orders(30, 31)})
    engine.step({"c": orders(5, 6), "b": orders(31, 38), "a": orders(10, 11)})
    engine.step({"b": orders(38, 39), "c": orders(6, 7), "a": orders(11, 12)})


def test_heads_that_kept_different_slots_still_attend_by_order(kind: Kind) -> None:
    engine = Engine(kind)
    engine.step({"a": orders(0, 13), "b": orders(0, 6)})
    engine.keep("a", 0, 0, [0, 5, 12])
    engine.keep("a", 0, 1, [2])
    engine.keep("a", 1, 1, list(range(1, 13)))
    engine.step({"a": orders(13, 14), "b": orders(6, 7)})
    engine.step({"a": orders(20, 25), "b": orders(7, 8)})
    engine.step({"b": orders(8, 12), "a": orders(25, 26)})


def test_a_fork_sees_the_shared_past_and_its_own_future(kind: Kind) -> None:
    engine = Engine(kind)
    engine.step({"a": orders(0, 10)})
    engine.store.copy(*engine.table.fork("a", "b"))
    for record in (engine.keys, engine.values):
        record |= {("b", layer, head): dict(rows) for (_, layer, head), rows in record.items()}
    engine.step({"a": orders(10, 11), "b": orders(10, 14)})
    engine.step({"a": orders(11, 12), "b": orders(14, 15)})


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_chunks_give_what_one_call_gives(kind: Kind, chunk: int) -> None:
    whole, parts = Engine(kind, 1), Engine(kind, 1)
    tensors = tuple(whole.rows(17, h) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    q, k, v = tensors
    expected = whole.step({"a": orders(0, 17)}, (q, k, v))
    found = []
    for start in range(0, 17, chunk):
        rows = slice(start, min(start + chunk, 17))
        part = parts.step({"a": orders(start, rows.stop)}, (q[:, rows], k[:, rows], v[:, rows]))
        found.append(part)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-6)


def test_a_result_does_not_depend_on_the_rest_of_the_batch(kind: Kind) -> None:
    alone, together = Engine(kind, 2), Engine(kind, 2)
    tensors = [tuple(alone.rows(n, h) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)) for n in (6, 1)]
    poison = torch.full((LAYERS, 30, KV_HEADS * GROUP, WIDTH), torch.nan)
    # a neighbour whose numbers went wrong, and that is longer
    with pytest.raises(AssertionError):
        together.step({"b": orders(0, 30)}, (poison, poison[:, :, :KV_HEADS], poison[:, :, :KV_HEADS]))
    for (q, k, v), order in zip(tensors, (orders(0, 6), orders(6, 7)), strict=True):
        expected = alone.step({"a": order}, (q, k, v))
        extra = tuple(torch.cat([t, torch.full_like(t[:, :1], torch.nan)], dim=1) for t in (q, k, v))
        together.table.append("a", order, order)
        together.table.append("b", orders(100, 101), orders(100, 101))
        batch = [SequenceRows("a", 0, len(order)), SequenceRows("b", len(order), len(order) + 1)]
        attention = kind(together.table, together.store, batch)
        for layer in range(LAYERS):
            found = attention.attend(layer, *(t[layer] for t in extra))[: len(order)]
            torch.testing.assert_close(found, expected[layer], rtol=1e-5, atol=1e-6)


def test_observed_rows_are_the_rotated_queries_of_every_layer(kind: Kind) -> None:
    engine = Engine(kind)
    for name, order in {"a": orders(0, 4), "b": orders(0, 1)}.items():
        engine.table.append(name, order, order)
    batch = [SequenceRows("b", 4, 5), SequenceRows("a", 0, 4)]
    attention = kind(engine.table, engine.store, batch, observe={"a": [2, 3], "b": range(4, 5)})
    q, k, v = (engine.rows(5, h) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    for layer in range(LAYERS):
        attention.attend(layer, q[layer], k[layer], v[layer])
    assert all(torch.equal(attention.observed["a"][layer], q[layer, 2:4]) for layer in range(LAYERS))
    assert all(torch.equal(attention.observed["b"][layer], q[layer, 4:]) for layer in range(LAYERS))
    k_read, _ = engine.store.read(engine.table.slots("b", 1))
    assert torch.equal(k_read[:, 0], k[1, 4])


def test_pages_in_bf16_serve_queries_in_fp32(kind: Kind) -> None:
    engine = Engine(kind)
    engine.store = PageStore(400, PAGE_SIZE, WIDTH, torch.bfloat16)
    q, k, v = (engine.rows(6, h) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    engine.step({"a": orders(0, 6)}, (q, k.bfloat16().float(), v.bfloat16().float()))
