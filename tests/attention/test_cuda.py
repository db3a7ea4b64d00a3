"""CudaAttention on the CPU against dense attention, with the oracles and with the kernels interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention import cuda
from mmserve.attention.backend import attention_for
from mmserve.attention.cpu import CpuAttention
from mmserve.attention.cuda import CudaAttention, HeadTables, to_device
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kernels.prefill_attention import AttentionIndex, Partial, prefill_attention
from mmserve.kv.table import PageTable
from tests.attention.test_paged import GROUP, KV_HEADS, LAYERS, PAGE_SIZE, Engine, orders


@pytest.fixture(params=["naive", "interpret"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv(VARIABLE, name)
    return name


def test_every_device_has_its_attention() -> None:
    devices = {"cpu": CpuAttention, "cuda": CudaAttention, "meta": PagedAttention}
    assert {name: attention_for(torch.device(name)) for name in devices} == devices


def test_prompts_and_decodes_of_a_batch_each_see_their_own_past() -> None:
    engine = Engine(CudaAttention)
    engine.step({"a": orders(0, 9), "b": orders(0, 30, 3)})
    engine.step({"a": orders(9, 10), "c": orders(0, 5), "b": orders(30, 31)})
    engine.step({"c": orders(5, 6), "b": orders(31, 38), "a": orders(10, 11)})
    engine.step({"b": orders(38, 39), "c": orders(6, 7), "a": orders(11, 12)})


def test_slots_in_one_run_are_read_in_place_others_through_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(CudaAttention), list[bool]()

    def recorded(
        q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, *, scale: float, tables: Tensor | None
    ) -> Partial:
        seen.append(tables is not None)
        return prefill_attention(q, k, v, index, scale=scale, tables=tables)

    monkeypatch.setattr(cuda, "prefill_attention", recorded)
    engine.table.reserve("a", 17)
    engine.step({"a": orders(0, 9)})
    engine.step({"a": orders(9, 17)})
    assert seen == [False] * 2 * LAYERS
    # its reservation is used up, and the pages beside it are not free
    engine.table.reserve("b", 5)
    engine.step({"a": orders(17, 25), "b": orders(0, 5)})
    assert seen[2 * LAYERS :] == [True] * LAYERS


def test_heads_that_kept_different_slots_still_attend_by_order() -> None:
    engine = Engine(CudaAttention)
    engine.step({"a": orders(0, 13), "b": orders(0, 6)})
    engine.keep("a", 0, 0, [0, 5, 12])
    engine.keep("a", 0, 1, [2])
    engine.keep("a", 1, 1, list(range(1, 13)))
    engine.keep("b", 1, 0, [])
    engine.step({"a": orders(13, 14), "b": orders(6, 7)})
    engine.step({"a": orders(20, 25), "b": orders(7, 8)})
    engine.step({"b": orders(8, 12), "a": orders(25, 26)})


@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_chunks_give_what_one_call_gives(chunk: int) -> None:
    whole, parts = Engine(CudaAttention, 1), Engine(CudaAttention, 1)
    q, k, v = (whole.rows(17, h) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    expected = whole.step({"a": orders(0, 17)}, (q, k, v))
    found = []
    for start in range(0, 17, chunk):
        rows = slice(start, min(start + chunk, 17))
        part = parts.step({"a": orders(start, rows.stop)}, (q[:, rows], k[:, rows], v[:, rows]))
        found.append(part)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-6)


def test_a_fork_sees_the_shared_past_and_its_own_future() -> None:
    engine = Engine(CudaAttention)
    engine.step({"a": orders(0, 10)})
    engine.store.copy(*engine.table.fork("a", "b"))
    for record in (engine.keys, engine.values):
        record |= {("b", layer, head): dict(rows) for (_, layer, head), rows in record.items()}
    engine.step({"a": orders(10, 11), "b": orders(10, 14)})


def test_the_batch_may_be_listed_in_any_order_and_queries_observed() -> None:
    engine = Engine(CudaAttention)
    for name, order in {"a": orders(0, 4), "b": orders(0, 1)}.items():
        engine.table.append(name, order, order)
    batch = [SequenceRows("b", 4, 5), SequenceRows("a", 0, 4)]
    q, k, v = (engine.rows(5, h) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    kinds = [
        kind(engine.table, engine.store, batch, observe={"a": [2, 3], "b": range(4, 5)})
        for kind in (PagedAttention, CudaAttention)
    ]
    for layer in range(LAYERS):
        expected, found = (kind.attend(layer, q[layer], k[layer], v[layer]) for kind in kinds)
        torch.testing.assert_close(found, expected)
    for name in ("a", "b"):
        for expected, found in zip(*(kind.observed[name] for kind in kinds), strict=True):
            assert torch.equal(found, expected)


def test_another_type_than_that_of_the_pages_still_works() -> None:
    engine = Engine(CudaAttention)
    engine.table.append("a", orders(0, 4), orders(0, 4))
    attention = CudaAttention(engine.table, engine.store, [SequenceRows("a", 0, 4)])
    q, k, v = (engine.rows(4, h)[0].double() for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    assert attention.attend(0, q, k, v).dtype == torch.float64


def test_tables_hold_every_page_and_are_made_in_steps() -> None:
    table = PageTable(LAYERS, KV_HEADS, 400, PAGE_SIZE)
    for name, count in {"a": 70, "b": 3}.items():
        table.append(name, orders(0, count), orders(0, count))
    table.keep("a", 1, 0, np.array([4, 9]))
    pages, lengths = HeadTables.of(table, ["b", "a"])
    assert pages.shape == (LAYERS, 4, KV_HEADS, 32)
    assert lengths[:, :2].tolist() == [[[3, 3], [70, 70]], [[3, 3], [2, 70]]]
    assert not lengths[:, 2:].any()
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        slots = table.slots("a", layer)[head]
        index = np.arange(lengths[layer, 1, head])
        assert np.array_equal(
            pages[layer, 1, head, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE, slots[slots >= 0]
        )


def test_a_copy_to_the_device_takes_any_layout() -> None:
    array = np.arange(6).reshape(2, 3).T
    assert to_device(array, torch.device("cpu")).tolist() == array.tolist()
    assert to_device(np.empty((0, 3), np.int32), torch.device("cpu")).shape == (0, 3)
