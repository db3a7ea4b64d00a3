"""Slots that are seen until some order only: segments, their tiles, and attention against a dense mask."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.cpu import CpuAttention
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.attention.tiles import Chunk, segmented_index
from mmserve.attention.visibility import runs_of, segments
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kernels.prefill_attention import cpu as native
from mmserve.kernels.prefill_attention.index import check_index, tile_keys, tile_rows_of
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable
from mmserve.pruning.carriers import seen_until

LAYERS, KV_HEADS, GROUP, WIDTH, PAGE_SIZE = 2, 2, 3, 16, 4
Kind = type[PagedAttention]

# text, three frames of 5, text, frames of 1 and 7, text; and a prompt that begins and ends with frames
PROMPTS = (
    [-1] * 6 + [0] * 5 + [1] * 5 + [2] * 5 + [-1] * 3 + [3] + [4] * 7 + [-1] * 2,
    [0] * 4 + [1] * 4 + [2] * 4 + [3] * 9,
)


def until_of(frames: list[int], orders: IntArray) -> IntArray:
    """The same in orders that are not those of a prompt without gaps."""
    until = seen_until(torch.tensor(frames)).numpy()
    ends = np.append(orders, np.iinfo(np.int32).max)
    found: IntArray = ends[np.minimum(until, len(orders))].astype(np.int32)
    return found


@pytest.mark.parametrize("frames", PROMPTS)
@pytest.mark.parametrize("rows", [1, 2, 9, 18, None])
def test_segments_see_what_the_rule_says(frames: list[int], rows: int | None) -> None:
    count = len(frames) if rows is None else rows
    orders = np.arange(10, 10 + 3 * len(frames), 3, dtype=np.int32)
    until = until_of(frames, orders)
    found = segments(orders, until, count)
    assert [found[0].start, found[-1].stop] == [len(frames) - count, len(frames)]
    for before, after in pairwise(found):
        assert before.stop == after.start
    for segment in found:
        for row in range(segment.start, segment.stop):
            seen = [*segment.seen.tolist(), *range(segment.start, row + 1)]
            assert seen == [k for k in range(row + 1) if orders[row] < until[k]]


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_the_slots_they_were_made_of(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = np.flatnonzero(rng.random(60) < rng.random())
    runs = runs_of(slots)
    found = [start + stride * i for start, stride, length in runs for i in range(length)]
    assert found == slots.tolist()
    assert all(run.stride >= 1 and run.length >= 1 for run in runs)


def test_carriers_between_frames_are_one_run() -> None:
    slots = np.array([0, 1, 2, 3, 13, 23, 33, 43])
    assert runs_of(slots) == [(0, 1, 4), (13, 10, 4)]


@pytest.mark.parametrize("tile_rows", [2, 4, 128])
def test_the_index_keeps_its_promises(tile_rows: int) -> None:
    chunks, lengths = [], []
    start = 0
    for frames, rows in zip(PROMPTS, (20, 21), strict=True):
        orders = np.arange(len(frames), dtype=np.int32)
        chunks.append(Chunk(start, rows, segments(orders, until_of(frames, orders), rows)))
        lengths.append([len(frames)] * KV_HEADS)
        start += rows
    chunks.append(Chunk(start, 5))
    lengths.append([9, 7])
    index = segmented_index(chunks, np.array(lengths, np.int32), group=GROUP, tile_rows=tile_rows)
    flat = torch.tensor(lengths).view(-1, 1)
    check_index(index, flat, q_heads=GROUP)
    tiles = [tile for tile in index.tiles.tolist() if tile[1] == 0]
    packed = [row for tile in tiles for row in tile_rows_of(index, tile).tolist()]
    assert sorted(packed) == list(range(len(index.row_order)))
    sizes = [len(tile_keys(index, tile)) for tile in index.tiles.tolist()]
    assert sizes == sorted(sizes, reverse=True)


class Prompt:
    """One prompt's tensors, and what every row should come to."""

    def __init__(self, frames: list[int], dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        self.q, self.k, self.v = (
            torch.randn(LAYERS, len(frames), h, WIDTH, generator=generator).to(dtype) for h in heads
        )
        self.orders = np.arange(len(frames), dtype=np.int32)
        self.until = until_of(frames, self.orders)

    def expected(self) -> Tensor:
        orders, until = torch.from_numpy(self.orders), torch.from_numpy(self.until)
        visible = (orders[:, None] >= orders) & (orders[:, None] < until)
        k, v = (x.float().repeat_interleave(GROUP, 2) for x in (self.k, self.v))
        scores = torch.einsum("lqhd,lkhd->lhqk", self.q.float(), k) * WIDTH**-0.5
        return torch.einsum("lhqk,lkhd->lqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def attended(kind: Kind, prompt: Prompt, chunk: int, *, reserved: bool, other: bool = False) -> Tensor:
    """The prompt in chunks of so many rows, what is not seen any more leaving in between."""
    table = PageTable(LAYERS, KV_HEADS, 400, PAGE_SIZE)
    store = PageStore(400, PAGE_SIZE, WIDTH, prompt.q.dtype)
    if reserved:
        table.reserve("a", len(prompt.orders))
    found, count = [], len(prompt.orders)
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        size = rows.stop - start
        table.append("a", prompt.orders[rows], prompt.orders[rows])
        if not reserved:
            # pages between those of the prompt
            table.reserve(f"between {start}", 1)
        held = table.order("a", 0, 0)
        batch = [SequenceRows("a", 0, size, prompt.until[held])]
        q, k, v = (x[:, rows] for x in (prompt.q, prompt.k, prompt.v))
        if other:
            # an ordinary chunk beside it
            table.append("b", prompt.orders[rows][:2], prompt.orders[rows][:2])
            q, k, v = (torch.cat([x, x[:, :2]], 1) for x in (q, k, v))
            batch.append(SequenceRows("b", size, size + min(size, 2)))
        attention = kind(table, store, batch)
        found.append(torch.stack([attention.attend(x, q[x], k[x], v[x])[:size] for x in range(LAYERS)]))
        after = prompt.orders[rows.stop] if rows.stop < count else count
        stays = np.flatnonzero(prompt.until[held] > after)
        gone = np.flatnonzero(prompt.until[held] <= after)
        if len(gone):
            store.copy(*table.compact("a", int(gone[0]), stays[stays > gone[0]]))
        table.check()
    return torch.cat(found, 1)


@pytest.mark.parametrize("frames", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("kind", [PagedAttention, CpuAttention])
def test_chunks_of_any_size_give_what_the_mask_gives(
    frames: list[int], chunk: int, reserved: bool, kind: Kind
) -> None:
    prompt = Prompt(frames, torch.float32)
    found = attended(kind, prompt, chunk, reserved=reserved)
    torch.testing.assert_close(found, prompt.expected(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["naive", "interpret"])
@pytest.mark.parametrize("frames", PROMPTS)
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("reserved", [True, False])
def test_the_kernels_of_a_gpu_give_what_the_mask_gives(
    kernels: str, frames: list[int], chunk: int, reserved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    prompt = Prompt(frames, torch.float32)
    found = attended(CudaAttention, prompt, chunk, reserved=reserved, other=True)
    torch.testing.assert_close(found, prompt.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["native", "blocked"])
@pytest.mark.parametrize("frames", PROMPTS)
@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("reserved", [True, False])
def test_bf16_on_a_cpu_runs_segment_by_segment(
    kernel: str, frames: list[int], chunk: int, reserved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "native" and not native.is_available(*2 * [torch.empty(1, WIDTH, dtype=torch.bfloat16)]):
        pytest.skip("no AVX512-BF16 here, or no compiler")
    if kernel == "blocked":
        monkeypatch.setattr(native, "is_available", lambda q, k: False)
    prompt = Prompt(frames, torch.bfloat16)
    found = attended(CpuAttention, prompt, chunk, reserved=reserved)
    torch.testing.assert_close(found.float(), prompt.expected(), rtol=0, atol=0.03)
