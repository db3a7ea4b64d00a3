"""The prefill kernel in Triton's interpreter and its oracle against dense attention under the same mask."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.kernels.merge_lse.naive import Partial, merge_lse
from mmserve.kernels.prefill_attention import naive, prefill_attention, triton
from mmserve.kernels.prefill_attention.index import (
    AttentionIndex,
    Tile,
    check_index,
    dense_index,
    pack_tiles,
)
from tests.kernels import bf16_shim

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
KV_HEADS = 2
PAGE_SIZE = 8
BLOCK = 16
SMALL = triton.Config(block_keys=16, num_warps=4, num_stages=2)

kernel = partial(triton.prefill_attention, config=SMALL)


@dataclass(frozen=True, slots=True)
class Case:
    """A batch, the index of its attention, and which rows see which keys by the plainest rule."""

    index: AttentionIndex
    key_lengths: list[int]
    visible: list[Tensor]  # per sequence, bool [Hq, rows, keys]
    row_counts: list[int]


def uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_keys(rng: random.Random, length: int, needed: set[int]) -> Tile:
    """Disjoint runs, whole blocks and columns that hold `needed` among others; rows are set by the caller."""
    free = set(range(length))
    runs: list[tuple[int, int, int]] = []
    blocks: list[int] = []
    for _ in range(rng.randrange(4)):
        start, stride = rng.randrange(length), rng.choice([1, 1, 2, 5])
        run = range(start, length, stride)[: rng.randrange(1, length + 1)]
        if free >= set(run):
            runs.append((start, stride, len(run)))
            free -= set(run)
    for block in range(length // BLOCK):
        keys = set(range(block * BLOCK, (block + 1) * BLOCK))
        if rng.random() < 0.4 and free >= keys:
            blocks.append(block)
            free -= keys
    columns = [key for key in free if key in needed or rng.random() < 0.2]
    rng.shuffle(columns)
    return Tile(0, 0, (), runs, blocks, columns)


def random_case(seed: int, *, group: int, permuted: bool, tile_rows: int = 16) -> Case:
    """Two sequences, the second behind a cached prefix; rows and keys in random tiles, each row in one."""
    rng = random.Random(seed)
    row_counts, older = [rng.randrange(1, 24), rng.randrange(1, 24)], [0, rng.randrange(1, 20)]
    key_lengths = [rows + old for rows, old in zip(row_counts, older, strict=True)]
    orders = [torch.randperm(keys, generator=torch.Generator().manual_seed(seed)) for keys in key_lengths]
    if not permuted:
        orders = [torch.arange(keys) for keys in key_lengths]
    tiles, visible, packed = [], [], 0
    for sequence, (rows, keys, order) in enumerate(zip(row_counts, key_lengths, orders, strict=True)):
        place = {int(value): at for at, value in enumerate(order)}
        seen = torch.zeros(KV_HEADS * group, rows, keys, dtype=torch.bool)
        for head in range(KV_HEADS * group):
            left = rng.sample(range(rows), rows)
            while left:
                count = rng.randrange(1, tile_rows + 1)
                chosen, left = left[:count], left[count:]
                row_order = torch.tensor(chosen) + keys - rows
                tile = random_keys(rng, keys, {place[int(own)] for own in row_order})
                tiles.append(tile._replace(sequence=sequence, head=head, rows=[packed + r for r in chosen]))
                axis = torch.zeros(keys, dtype=torch.bool)
                for start, stride, length in tile.runs:
                    axis[start : start + stride * length : stride] = True
                for block in tile.blocks:
                    axis[block * BLOCK : (block + 1) * BLOCK] = True
                axis[list(tile.columns)] = True
                seen[head, chosen] = axis & (order <= row_order[:, None])
        visible.append(seen)
        packed += rows
    begins = torch.tensor([0, key_lengths[0]])
    row_order = torch.cat([torch.arange(k - r, k) for r, k in zip(row_counts, key_lengths, strict=True)])
    index = pack_tiles(
        tiles,
        row_order=row_order.int(),
        key_begin=begins[:, None].repeat(1, KV_HEADS),
        tile_rows=tile_rows,
        block_size=BLOCK,
        key_order=torch.cat(orders).int() if permuted else None,
    )
    return Case(index, key_lengths, visible, row_counts)


def union_attention(q: Tensor, k: Tensor, v: Tensor, case: Case, scale: float) -> Partial:
    """Dense attention in fp64 under the mask of a case; k and v are on the axis."""
    outs, lses, at, axis = [], [], 0, 0
    group = q.shape[1] // KV_HEADS
    for seen, rows, keys in zip(case.visible, case.row_counts, case.key_lengths, strict=True):
        queries = q[at : at + rows].double().transpose(0, 1)
        own_k, own_v = (
            kv[axis : axis + keys].double().repeat_interleave(group, 1).transpose(0, 1) for kv in (k, v)
        )
        scores = (queries @ own_k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        outs.append((torch.softmax(scores, -1) @ own_v).transpose(0, 1))
        lses.append(torch.logsumexp(scores, -1).T)
        at, axis = at + rows, axis + keys
    return Partial(torch.cat(outs).float(), torch.cat(lses).float())


def paginate(kv: Tensor, case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """K or V of the axis in pages of random order, nan where no key is, and the tables."""
    max_pages = -(-max(case.key_lengths) // PAGE_SIZE)
    count = len(case.key_lengths) * KV_HEADS * max_pages
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tables = order.int().view(len(case.key_lengths), KV_HEADS, max_pages)
    pages = torch.full((count, PAGE_SIZE, kv.shape[2]), torch.nan, dtype=kv.dtype)
    axis = 0
    for sequence, keys in enumerate(case.key_lengths):
        slots = torch.arange(keys)
        for head in range(KV_HEADS):
            page = tables[sequence, head, slots // PAGE_SIZE].long()
            pages[page, slots % PAGE_SIZE] = kv[axis : axis + keys, head]
        axis += keys
    return pages, tables


def batch(case: Case, group: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q = uniform(sum(case.row_counts), KV_HEADS * group, d, seed=0).to(dtype)
    k, v = (uniform(sum(case.key_lengths), KV_HEADS, d, seed=seed).to(dtype) for seed in (1, 2))
    return q, k, v


def assert_same(found: Partial, expected: Partial, tolerance: float) -> None:
    torch.testing.assert_close(found.out.float(), expected.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=tolerance, rtol=0)


def poisoned(q: Tensor) -> Partial:
    """Memory that a kernel forgets to write shows."""
    return Partial(torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 7]), st.booleans())
def test_random_tiles_equal_dense_attention_under_their_union(seed: int, group: int, permuted: bool) -> None:
    case = random_case(seed, group=group, permuted=permuted)
    lengths = torch.tensor(case.key_lengths)[:, None].expand(-1, KV_HEADS)
    check_index(case.index, lengths, q_heads=KV_HEADS * group)
    q, k, v = batch(case, group, 8, torch.float32)
    expected = union_attention(q, k, v, case, 1.5)
    assert_same(naive.prefill_attention(q, k, v, case.index, scale=1.5), expected, 1e-5)
    k_pages, tables = paginate(k, case, seed)
    v_pages, _ = paginate(v, case, seed)
    paged = naive.prefill_attention(q, k_pages, v_pages, case.index, scale=1.5, tables=tables)
    assert_same(paged, expected, 1e-5)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 4]), st.booleans(), st.booleans())
def test_random_tiles_in_the_kernel_equal_dense_attention_too(
    seed: int, group: int, permuted: bool, paged: bool
) -> None:
    case = random_case(seed, group=group, permuted=permuted)
    q, k, v = batch(case, group, 8, torch.float16)
    expected, tables = union_attention(q, k, v, case, 0.5), None
    if paged:
        (k, tables), (v, _) = (paginate(kv, case, seed) for kv in (k, v))
    found = kernel(q, k, v, case.index, scale=0.5, tables=tables, out=poisoned(q))
    assert_same(found, expected, 1e-3)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("seed", "group", "d", "permuted", "dtype"),
    [
        (1, 1, 8, False, torch.float32),
        (2, 4, 24, True, torch.float16),
        (3, 1, 64, False, torch.float16),
        (4, 7, 16, True, torch.bfloat16),
        (5, 1, 136, False, torch.bfloat16),
    ],
)
def test_kernel_equals_dense_attention_under_the_union(
    seed: int, group: int, d: int, permuted: bool, dtype: torch.dtype, paged: bool
) -> None:
    case = random_case(seed, group=group, permuted=permuted)
    q, k, v = batch(case, group, d, dtype)
    expected = union_attention(q, k, v, case, d**-0.5)
    tables = None
    if paged:
        k, tables = paginate(k, case, seed)
        v, _ = paginate(v, case, seed)
    found = triton.prefill_attention(
        q, k, v, case.index, scale=d**-0.5, tables=tables, out=poisoned(q), config=SMALL
    )
    assert found.out.dtype == dtype
    assert_same(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("paged", [False, True])
def test_storage_may_be_in_another_order_than_the_axis(paged: bool) -> None:
    case = random_case(6, group=1, permuted=True)
    q, k, v = batch(case, 1, 16, torch.float16)
    expected = union_attention(q, k, v, case, 0.25)
    # stored[slot[j]] is key j
    slots = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in case.key_lengths]
    rows = torch.cat([slots[0], slots[1] + case.key_lengths[0]])
    k, v = (torch.empty_like(kv).index_copy_(0, rows, kv) for kv in (k, v))
    tables = None
    if paged:
        (k, tables), (v, _) = (paginate(kv, case, 1) for kv in (k, v))
    index = replace(case.index, key_slot=torch.cat(slots).int())
    runs: tuple[Callable[..., Partial], ...] = (naive.prefill_attention, kernel)
    for run in runs:
        assert_same(run(q, k, v, index, scale=0.25, tables=tables), expected, 1e-3)


def causal_case(row_counts: list[int], key_lengths: list[int], group: int, tile_rows: int) -> Case:
    index = dense_index(
        row_counts, key_lengths, q_heads=KV_HEADS * group, kv_heads=KV_HEADS, tile_rows=tile_rows
    )
    visible = [
        (torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]).expand(KV_HEADS * group, -1, -1)
        for rows, keys in zip(row_counts, key_lengths, strict=True)
    ]
    return Case(index, key_lengths, visible, row_counts)


@pytest.mark.parametrize("d", [8, 40, 56, 72, 80, 96, 120, 128, 184, 200, 248, 256])
@pytest.mark.parametrize("paged", [False, True])
def test_heads_may_be_any_multiple_of_8_wide(d: int, paged: bool) -> None:
    case = causal_case([3, 17], [9, 17], 1, 16)
    q, k, v = batch(case, 1, d, torch.float16)
    expected, tables = union_attention(q, k, v, case, d**-0.5), None
    if paged:
        (k, tables), (v, _) = (paginate(kv, case, d) for kv in (k, v))
    found = kernel(q, k, v, case.index, scale=d**-0.5, tables=tables, out=poisoned(q))
    assert_same(found, expected, 1e-3)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("paged", [False, True])
def test_sequences_of_no_key_and_of_one(group: int, paged: bool) -> None:
    case = causal_case([2, 1, 3], [0, 1, 3], group, 16)
    q, k, v = batch(case, group, 16, torch.float16)
    expected, tables = union_attention(q, k, v, case, 0.25), None
    if paged:
        (k, tables), (v, _) = (paginate(kv, case, 1) for kv in (k, v))
    found = kernel(q, k, v, case.index, scale=0.25, tables=tables, out=poisoned(q))
    assert_same(found, expected, 1e-3)
    assert found.out[:2].eq(0).all()
    assert found.lse[:2].eq(-torch.inf).all()


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(("group", "tile_rows", "block"), [(1, 16, 16), (4, 13, 32)])
def test_dense_is_causal_attention(
    monkeypatch: pytest.MonkeyPatch, group: int, tile_rows: int, block: int, described: bool
) -> None:
    monkeypatch.setattr(triton, "_capability", lambda device: 90 if described else 80)
    case = causal_case([5, 0, 1, 35], [21, 4, 1, 35], group, tile_rows)
    lengths = torch.tensor(case.key_lengths)[:, None].expand(-1, KV_HEADS)
    check_index(case.index, lengths, q_heads=KV_HEADS * group)
    q, k, v = batch(case, group, 32, torch.float16)
    found = triton.prefill_attention(
        q, k, v, case.index, scale=0.2, out=poisoned(q), config=triton.Config(block, 4, 2)
    )
    assert_same(found, union_attention(q, k, v, case, 0.2), 1e-3)


def test_heads_in_a_fused_projection_need_no_copy() -> None:
    case = causal_case([20], [20], 1, 16)
    q, _, _ = batch(case, 1, 16, torch.float16)
    fused = uniform(20, 3 * KV_HEADS, 16, seed=4).half()
    k, v = fused[:, :KV_HEADS], fused[:, -KV_HEADS:]
    found = triton.prefill_attention(q, k, v, case.index, scale=0.2, config=SMALL)
    assert_same(found, union_attention(q, k, v, case, 0.2), 1e-3)


def test_a_chunk_and_its_cached_prefix_merge_to_the_whole() -> None:
    whole = causal_case([35], [35], 2, 16)
    q, k, v = batch(whole, 2, 16, torch.float32)
    expected = union_attention(q, k, v, whole, 0.25)
    index_of = partial(dense_index, q_heads=KV_HEADS * 2, kv_heads=KV_HEADS, tile_rows=16)
    for cut in (1, 16, 34):
        prefix, chunk = index_of([35 - cut], [cut], query_starts=[cut]), index_of([35 - cut], [35 - cut])
        parts = [
            triton.prefill_attention(q[cut:], k[span], v[span], index, scale=0.25, config=SMALL)
            for index, span in ((prefix, slice(0, cut)), (chunk, slice(cut, 35)))
        ]
        merged = merge_lse(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
        assert_same(merged, Partial(expected.out[cut:], expected.lse[cut:]), 1e-5)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 16, 34])
def test_a_chunk_behind_its_prefix_in_pages_gives_the_rows_of_the_whole(cut: int) -> None:
    whole = causal_case([35], [35], 2, 16)
    q, k, v = batch(whole, 2, 16, torch.float16)
    expected = union_attention(q, k, v, whole, 0.25)
    (k, tables), (v, _) = (paginate(kv, whole, cut) for kv in (k, v))
    chunk = dense_index([35 - cut], [35], q_heads=KV_HEADS * 2, kv_heads=KV_HEADS, tile_rows=16)
    found = kernel(q[cut:], k, v, chunk, scale=0.25, tables=tables, out=poisoned(q[cut:]))
    assert_same(found, Partial(expected.out[cut:], expected.lse[cut:]), 1e-3)


@pytest.mark.parametrize("run", [naive.prefill_attention, kernel])
def test_a_row_that_sees_nothing_is_zero(run: Callable[..., Partial]) -> None:
    heads = torch.zeros(1, KV_HEADS, dtype=torch.int64)
    order = torch.tensor([0, 9], dtype=torch.int32)
    tiles = [Tile(0, head, [0, 1], runs=[(4, 1, 2)], columns=[8]) for head in range(KV_HEADS)]
    index = pack_tiles(tiles, row_order=order, key_begin=heads, tile_rows=16)
    q, k = uniform(2, KV_HEADS, 8, seed=0), uniform(10, KV_HEADS, 8, seed=1)
    out, lse = run(q, k, k, index, scale=1.0)
    assert out[0].eq(0).all()
    assert lse[0].eq(-torch.inf).all()
    assert out[1].ne(0).all()
    assert lse[1].isfinite().all()


def test_a_tile_without_rows_is_skipped() -> None:
    case = causal_case([5], [5], 1, 16)
    empty = torch.full((3, 10), 10**6, dtype=torch.int32)
    empty[:, 3] = 0
    index = replace(case.index, tiles=torch.cat([empty, case.index.tiles]))
    q, k, v = batch(case, 1, 8, torch.float16)
    found = triton.prefill_attention(q, k, v, index, scale=0.2, out=poisoned(q), config=SMALL)
    assert_same(found, union_attention(q, k, v, case, 0.2), 1e-3)


def test_skipped_blocks_are_never_read_into_the_result() -> None:
    case = causal_case([4], [64], 1, 16)
    q, k, v = batch(case, 1, 8, torch.float32)
    q, k = q.abs() + 0.1, k.abs()
    # every key of the third block is far below those before it
    k[32:48] = -30
    threshold = 1e-4
    exact = union_attention(q, k, v, case, 1.0)
    kept = triton.prefill_attention(q, k, v, case.index, scale=1.0, skip_threshold=threshold, config=SMALL)
    assert (kept.out - exact.out).abs().max() < 2 * threshold * 64
    v[32:48] = torch.nan
    again = triton.prefill_attention(q, k, v, case.index, scale=1.0, skip_threshold=threshold, config=SMALL)
    assert torch.equal(again.out, kept.out)
    assert triton.prefill_attention(q, k, v, case.index, scale=1.0, config=SMALL).out.isnan().all()


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ([Tile(0, 0, [0], runs=[(0, 2, 3)], columns=[4])], "every key once"),
        ([Tile(0, 0, [0], runs=[(0, 3, 5)])], "keys in"),
        ([Tile(0, 0, [0], blocks=[1])], "keys in"),
        ([Tile(0, 0, [3], runs=[(0, 1, 3)])], "to see itself"),
        ([Tile(0, 0, [0, 1], runs=[(0, 1, 4)]), Tile(0, 0, [1], runs=[(0, 1, 4)])], "in one tile"),
        ([Tile(0, 0, [0, 1, 2], runs=[(0, 1, 4)])], "at most 2 rows"),
    ],
)
def test_a_broken_index_is_found(tiles: list[Tile], message: str) -> None:
    index = pack_tiles(
        tiles,
        row_order=torch.arange(10, dtype=torch.int32),
        key_begin=torch.zeros(1, 1, dtype=torch.int64),
        tile_rows=2,
        block_size=8,
    )
    with pytest.raises(ValueError, match=message):
        check_index(index, torch.tensor([[10]]), q_heads=1)


def test_dispatch_keeps_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    case = causal_case([5], [9], 1, 16)
    q, k, v = batch(case, 1, 8, torch.float16)
    expected = union_attention(q, k, v, case, 0.2)
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        found = prefill_attention(q, k, v, case.index, scale=0.2)
        assert found.out.dtype == torch.float16
        assert_same(found, expected, 1e-3)
