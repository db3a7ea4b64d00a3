"""The compiled prefill attention against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.kernels.prefill_attention.cpu import is_available, prefill_attention

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(
    not is_available(torch.zeros(1, 1, 1, 8, dtype=BF16), torch.zeros(1, 8, dtype=BF16)),
    reason="needs a C compiler and a CPU with AVX512-BF16",
)


def dense(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """[n, Hq, d] from q [n, Hq, d] and k, v [Hkv, S, d], in float64."""
    rows, length = len(q), k.shape[1]
    seen = torch.ones(rows, length, dtype=torch.bool)
    group = q.shape[1] // len(k)
    keys, values = (t.double().repeat_interleave(group, 0) for t in (k, v))
    mask = seen.tril(length - rows) if is_causal else seen
    return functional.scaled_dot_product_attention(
        q.double().transpose(0, 1), keys, values, attn_mask=mask
    ).transpose(0, 1)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("rows", "length", "kv_heads", "group", "d"),
    [
        (1, 1, 1, 1, 8),
        (5, 5, 2, 7, 64),
        (7, 140, 2, 7, 64),
        (33, 300, 1, 4, 72),
        (3, 600, 2, 3, 128),
        (50, 513, 2, 1, 16),
        (7, 257, 3, 2, 256),
        (100, 256, 1, 1, 24),
    ],
)
def test_rows_equal_dense_attention(
    rows: int, length: int, kv_heads: int, group: int, d: int, is_causal: bool
) -> None:
    torch.manual_seed(rows * length + d)
    q = torch.randn(rows, kv_heads * group, d).to(BF16)
    k, v = (torch.randn(kv_heads, length, d).to(BF16) for _ in range(2))
    found = prefill_attention(
        q[None],
        k,
        v,
        torch.arange(kv_heads) * length,
        torch.full((kv_heads,), length, dtype=torch.int32),
        torch.arange(kv_heads + 1),
        scale=d**-0.5,
        is_causal=is_causal,
    )[0]
    # weights and results are rounded to bf16
    torch.testing.assert_close(found.double(), dense(q, k, v, is_causal), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("threads", [1, 3])
def test_slots_in_scattered_runs_and_heads_of_different_lengths(threads: int) -> None:
    """Slots that no run names are NaN."""
    torch.manual_seed(1)
    lengths, runs, rows, d = (70, 41), ((40, 1, 29), (3, 0, 38)), 6, 32
    k, v = (torch.full((400, d), torch.nan, dtype=BF16) for _ in range(2))
    q = torch.randn(rows, 4, d).to(BF16)
    first, keys, values, place = [], [], [], 380
    for length, parts in zip(lengths, runs, strict=True):
        head_k, head_v = (torch.randn(length, d).to(BF16) for _ in range(2))
        done = 0
        for part in parts:
            place -= part + 3
            first.append(place)
            k[place : place + part] = head_k[done : done + part]
            v[place : place + part] = head_v[done : done + part]
            done += part
        keys.append(head_k)
        values.append(head_v)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = prefill_attention(
            q[None],
            k,
            v,
            torch.tensor(first),
            torch.tensor([count for parts in runs for count in parts], dtype=torch.int32),
            torch.tensor([0, 3, 6]),
            scale=d**-0.5,
            is_causal=True,
        )[0]
    finally:
        torch.set_num_threads(before)
    for head in range(2):
        expected = dense(q[:, 2 * head : 2 * head + 2], keys[head][None], values[head][None], True)
        torch.testing.assert_close(found[:, 2 * head : 2 * head + 2].double(), expected, rtol=1e-2, atol=1e-2)


def test_threads_and_runs_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    rows, length, d = 40, 700, 64
    q = torch.randn(1, rows, 7, d).to(BF16)
    k, v = (torch.randn(length, d).to(BF16) for _ in range(2))
    one = (torch.tensor([0]), torch.tensor([length], dtype=torch.int32), torch.tensor([0, 1]))
    expected = prefill_attention(q, k, v, *one, scale=0.125, is_causal=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    slots = torch.randperm(length)
    scattered_k, scattered_v = (torch.empty_like(pages).index_copy_(0, slots, pages) for pages in (k, v))
    single = (slots, torch.ones(length, dtype=torch.int32), torch.tensor([0, length]))
    found = prefill_attention(q, scattered_k, scattered_v, *single, scale=0.125, is_causal=True)
    assert torch.equal(found, expected)


def test_heads_side_by_side_in_every_row_are_read_where_they_lie() -> None:
    """Tokens of pictures, as a vision tower has them: [B, N, H, d], every token sees its picture."""
    torch.manual_seed(2)
    pictures, tokens, heads, d = 3, 37, 2, 24
    q, k, v = (torch.randn(pictures, tokens, heads, d).to(BF16) for _ in range(3))
    first = torch.arange(pictures)[:, None] * tokens * heads + torch.arange(heads)
    found = prefill_attention(
        q,
        k,
        v,
        first.flatten(),
        torch.full((pictures * heads,), tokens, dtype=torch.int32),
        torch.arange(pictures * heads + 1),
        scale=d**-0.5,
        is_causal=False,
        slot_step=heads,
    )
    for picture in range(pictures):
        expected = dense(q[picture], k[picture].transpose(0, 1), v[picture].transpose(0, 1), False)
        torch.testing.assert_close(found[picture].double(), expected, rtol=1e-2, atol=1e-2)


def test_large_scores_do_not_overflow_and_nan_stays_nan() -> None:
    q = torch.full((1, 2, 1, 16), 60.0, dtype=BF16)
    k = torch.cat([torch.full((1, 16), -60.0), torch.full((1, 16), 60.0)]).to(BF16)
    v = torch.cat([torch.zeros(1, 16), torch.ones(1, 16)]).to(BF16)
    runs = (torch.tensor([0]), torch.tensor([2], dtype=torch.int32), torch.tensor([0, 1]))
    found = prefill_attention(q, k, v, *runs, scale=1.0, is_causal=True)[0, :, 0]
    # the smallest weight of a key that is seen is 2^-126
    torch.testing.assert_close(found, v, rtol=0, atol=1e-30)
    assert (found[0] == 0).all()
    k[1] = torch.nan
    found = prefill_attention(q, k, v, *runs, scale=1.0, is_causal=True)[0, :, 0]
    assert torch.equal(found[0], v[0]), "a key that is not seen matters"
    assert found[1].isnan().all()


@pytest.mark.parametrize(("first", "length"), [(-1, 2), (3, 2), (0, 1)])
def test_runs_outside_the_arrays_or_too_short_are_refused(first: int, length: int) -> None:
    q, pages = torch.zeros(1, 2, 1, 16, dtype=BF16), torch.zeros(4, 16, dtype=BF16)
    runs = (torch.tensor([first]), torch.tensor([length], dtype=torch.int32), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="a run leaves the arrays"):
        prefill_attention(q, pages, pages, *runs, scale=1.0, is_causal=True)
