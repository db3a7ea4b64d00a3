"""The compiled CPU kernel of an `AttentionIndex` against dense attention in fp64 under the same mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.kernels.merge_lse.naive import Partial, merge_lse
from mmserve.kernels.prefill_attention import naive, prefill_attention
from mmserve.kernels.prefill_attention.cpu_tiles import is_available, tile_attention
from mmserve.kernels.prefill_attention.index import Tile, dense_index, pack_tiles
from tests.kernels.attention_cases import (
    KV_HEADS,
    assert_same,
    batch,
    causal_case,
    paginate,
    random_case,
    uniform,
    union_attention,
)

SOME = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(not is_available(SOME, SOME), reason="needs AVX512-BF16 and a C compiler")
TOLERANCE = 1e-2  # of bf16 weights and outputs


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 4, 7]),
    st.sampled_from([8, 16, 40, 64, 72, 128]),
    st.booleans(),
    st.booleans(),
)
def test_random_tiles_equal_dense_attention_under_their_union(
    seed: int, group: int, d: int, permuted: bool, paged: bool
) -> None:
    case = random_case(seed, group=group, permuted=permuted)
    q, k, v = batch(case, group, d, torch.bfloat16)
    expected, tables = union_attention(q, k, v, case, d**-0.5), None
    if paged:
        (k, tables), (v, _) = (paginate(kv, case, seed) for kv in (k, v))
    found = tile_attention(q, k, v, case.index, scale=d**-0.5, tables=tables)
    assert found.out.dtype == torch.bfloat16
    assert_same(found, expected, TOLERANCE)


@pytest.mark.parametrize(("group", "tile_rows"), [(1, 128), (7, 128), (2, 500)])
def test_many_rows_and_keys(group: int, tile_rows: int) -> None:
    case = causal_case([700, 30], [700, 900], group, tile_rows)
    q, k, v = batch(case, group, 64, torch.bfloat16)
    assert_same(
        tile_attention(q, k, v, case.index, scale=0.3), union_attention(q, k, v, case, 0.3), TOLERANCE
    )


@pytest.mark.parametrize("paged", [False, True])
def test_storage_may_be_in_another_order_than_the_axis(paged: bool) -> None:
    case = random_case(6, group=1, permuted=True)
    q, k, v = batch(case, 1, 16, torch.bfloat16)
    expected = union_attention(q, k, v, case, 0.25)
    slots = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in case.key_lengths]
    rows = torch.cat([slots[0], slots[1] + case.key_lengths[0]])
    k, v = (torch.empty_like(kv).index_copy_(0, rows, kv) for kv in (k, v))
    tables = None
    if paged:
        (k, tables), (v, _) = (paginate(kv, case, 1) for kv in (k, v))
    index = replace(case.index, key_slot=torch.cat(slots).int())
    assert_same(tile_attention(q, k, v, index, scale=0.25, tables=tables), expected, TOLERANCE)


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = causal_case([2, 1, 3], [0, 1, 3], 1, 16)
    q, k, v = batch(case, 1, 16, torch.bfloat16)
    found = tile_attention(q, k, v, case.index, scale=0.25)
    assert_same(found, union_attention(q, k, v, case, 0.25)._replace(out=found.out.float()), TOLERANCE)
    assert found.out[:2].eq(0).all()
    assert found.lse[:2].eq(-torch.inf).all()


def test_heads_in_a_fused_projection_need_no_copy() -> None:
    case = causal_case([40], [40], 1, 16)
    q, _, _ = batch(case, 1, 16, torch.bfloat16)
    fused = uniform(40, 3 * KV_HEADS, 16, seed=4).bfloat16()
    k, v = fused[:, :KV_HEADS], fused[:, -KV_HEADS:]
    found = tile_attention(q, k, v, case.index, scale=0.2)
    assert_same(found, union_attention(q, k, v, case, 0.2), TOLERANCE)


def test_a_chunk_and_its_cached_prefix_merge_to_the_whole() -> None:
    whole = causal_case([300], [300], 2, 128)
    q, k, v = batch(whole, 2, 32, torch.bfloat16)
    expected = union_attention(q, k, v, whole, 0.25)
    for cut in (1, 37, 256):
        prefix = dense_index([300 - cut], [cut], q_heads=KV_HEADS * 2, kv_heads=KV_HEADS, query_starts=[cut])
        chunk = dense_index([300 - cut], [300 - cut], q_heads=KV_HEADS * 2, kv_heads=KV_HEADS)
        parts = [
            tile_attention(q[cut:], k[span], v[span], index, scale=0.25)
            for index, span in ((prefix, slice(0, cut)), (chunk, slice(cut, 300)))
        ]
        merged = merge_lse(torch.stack([p.out.float() for p in parts]), torch.stack([p.lse for p in parts]))
        assert_same(merged, Partial(expected.out[cut:], expected.lse[cut:]), TOLERANCE)


def test_a_rows_result_does_not_depend_on_threads() -> None:
    q, k, v = (uniform(600, KV_HEADS, 64, seed=seed).bfloat16() for seed in range(3))
    index = dense_index([600], [600], q_heads=KV_HEADS, kv_heads=KV_HEADS, tile_rows=128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = tile_attention(q, k, v, index, scale=0.125)
        torch.set_num_threads(1)
        again = tile_attention(q, k, v, index, scale=0.125)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.out, again.out)
    assert torch.equal(found.lse, again.lse)


@pytest.mark.parametrize("last", [301, 700, 1199])
def test_keys_in_rising_order_make_a_rows_result_that_of_the_row_alone(last: int) -> None:
    q, k, v = (uniform(rows, 1, 64, seed=rows).bfloat16() for rows in (2, 1200, 1201))
    found = [
        tile_attention(
            q,
            k,
            v[:1200],
            pack_tiles(
                [Tile(0, 0, rows, runs=[(0, 1, 1200)])],
                row_order=torch.tensor([300, last], dtype=torch.int32),
                key_begin=torch.zeros(1, 1, dtype=torch.int64),
            ),
            scale=0.125,
        )
        for rows in ([0], [0, 1])
    ]
    assert torch.equal(found[0].out[0], found[1].out[0])
    assert torch.equal(found[0].lse[0], found[1].lse[0])


def test_the_public_function_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMSERVE_KERNELS", raising=False)
    case = random_case(11, group=2, permuted=True)
    q, k, v = batch(case, 2, 16, torch.bfloat16)
    found = prefill_attention(q, k, v, case.index, scale=0.25)
    expected = tile_attention(q, k, v, case.index, scale=0.25)
    assert torch.equal(found.out, expected.out)
    assert_same(
        naive.prefill_attention(q, k, v, case.index, scale=0.25), union_attention(q, k, v, case, 0.25), 1e-5
    )


def test_keys_far_below_the_largest_are_left_out() -> None:
    case = causal_case([16], [1024], 2, 16)
    q, k, v = batch(case, 2, 32, torch.bfloat16)
    q, k = q.abs() + 0.1, k.abs()
    # every key of the third step is far below those before it
    k[512:768] = -30
    threshold = 1e-4
    exact = union_attention(q, k, v, case, 1.0)
    kept = tile_attention(q, k, v, case.index, scale=1.0, skip_threshold=threshold)
    assert_same(kept, exact, TOLERANCE)
    v[512:768] = torch.nan
    again = tile_attention(q, k, v, case.index, scale=1.0, skip_threshold=threshold)
    assert torch.equal(again.out, kept.out)
    assert tile_attention(q, k, v, case.index, scale=1.0).out.isnan().all()
    public = prefill_attention(q, k, v, case.index, scale=1.0, skip_threshold=threshold)
    assert torch.equal(public.out, kept.out)


@pytest.mark.parametrize("place", [-1, 8, 1000])
def test_a_key_that_is_nowhere_is_an_error(place: int) -> None:
    order = torch.tensor([2000], dtype=torch.int32)
    index = pack_tiles(
        [Tile(0, 0, [0], columns=[0, place])],
        row_order=order,
        key_begin=torch.zeros(1, 1, dtype=torch.int64),
        key_slot=torch.arange(8, dtype=torch.int32),
    )
    q, k = (uniform(n, 1, 8, seed=n).bfloat16() for n in (1, 8))
    if place == -1:
        index = replace(index, key_slot=torch.full((8,), -1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="not in storage"):
        tile_attention(q, k, k, index, scale=1.0)
