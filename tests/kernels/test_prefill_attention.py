"""The prefill kernel in Triton's interpreter and its oracle against dense attention under the same mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.kernels.merge_lse.naive import Partial, merge_lse
from mmserve.kernels.prefill_attention import naive, prefill_attention, triton
from mmserve.kernels.prefill_attention.index import (
    Tile,
    check_index,
    dense_index,
    pack_tiles,
)
from tests.kernels import bf16_shim
from tests.kernels.attention_cases import (
    KV_HEADS,
    assert_same,
    batch,
    causal_case,
    paginate,
    poisoned,
    random_case,
    uniform,
    union_attention,
)

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SMALL = triton.Config(block_keys=16, num_warps=4, num_stages=2)

kernel = partial(triton.prefill_attention, config=SMALL)


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
