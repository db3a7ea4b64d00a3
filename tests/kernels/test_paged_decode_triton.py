"""The decode kernel in Triton's interpreter against its oracle, and the oracle against plain attention."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.kernels.paged_decode import naive_pages, paged_decode, triton
from mmserve.kernels.paged_decode.naive_pages import PageScales
from tests.kernels import bf16_shim

bf16_shim.install()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
KV_HEADS = 2


class Cache(NamedTuple):
    tables: Tensor
    lengths: Tensor
    pages: int


def make_cache(page_size: int, max_pages: int = 4) -> Cache:
    """Pages in random order; a head without slots, one of one, one of full pages, one with a ragged last."""
    lengths = [[0, 1], [max_pages * page_size, (max_pages - 1) * page_size - 3]]
    count = len(lengths) * KV_HEADS * max_pages
    order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(3))
    tables = order[:count].int().view(len(lengths), KV_HEADS, max_pages)
    return Cache(tables, torch.tensor(lengths, dtype=torch.int32), count + 3)


def random(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1)."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def poison(pages: Tensor, cache: Cache) -> Tensor:
    """nan in every slot, of pages [pages, page_size, ...], that no head has."""
    page_size = pages.shape[1]
    used = torch.zeros(pages.shape[:2], dtype=torch.bool)
    for table, length in zip(cache.tables.flatten(0, 1), cache.lengths.flatten().tolist(), strict=True):
        slots = torch.arange(length)
        used[table[slots // page_size].long(), slots % page_size] = True
    return pages.masked_fill(~used.view(*used.shape, *[1] * (pages.ndim - 2)), torch.nan)


def assert_same(found: naive_pages.Decoded, expected: naive_pages.Decoded, tolerance: float) -> None:
    torch.testing.assert_close(found.out.float(), expected.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=tolerance, rtol=0)
    if expected.mass is not None:
        assert found.mass is not None
        torch.testing.assert_close(found.mass, expected.mass, atol=tolerance, rtol=0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows."""
    empty = torch.empty
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("dtype", "group", "d", "page_size", "splits", "block"),
    [
        (torch.float32, 1, 24, 16, 1, 16),
        (torch.float16, 1, 8, 16, 3, 16),
        (torch.float16, 4, 72, 32, 2, 16),
        (torch.float16, 7, 64, 8, 5, 32),
        (torch.float16, 20, 16, 24, 2, 64),
        (torch.float16, 1, 256, 16, 2, 16),
        (torch.float16, 4, 200, 32, 1, 32),
        (torch.bfloat16, 4, 16, 8, 1, 16),
        (torch.bfloat16, 7, 128, 32, 2, 64),
    ],
)
def test_kernel_equals_oracle(
    dtype: torch.dtype, group: int, d: int, page_size: int, splits: int, block: int
) -> None:
    cache = make_cache(page_size)
    q = random(2, KV_HEADS * group, d, seed=0).to(dtype)
    k, v = (poison(random(cache.pages, page_size, d, seed=seed), cache).to(dtype) for seed in (1, 2))
    scale, mass = 2 * d**-0.5, group != 1
    expected = naive_pages.paged_decode(q, k, v, cache.tables, cache.lengths, scale=scale, mass=mass)
    found = triton.paged_decode(
        q, k, v, cache.tables, cache.lengths, scale=scale, mass=mass,
        splits=splits, config=triton.Config(block),
    )  # fmt: skip
    assert found.out.dtype == dtype
    assert found.out[0, :group].eq(0).all(), "an empty head"
    assert_same(found, expected, TOLERANCE[dtype])


Kind = Literal["int8", "int4", "fp8"]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.float16, 1), (torch.float16, 7), (torch.bfloat16, 4)], ids=str
)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("key_axis", ["slot", "channel"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantized_pages_equal_oracle(
    kind: Kind, key_axis: Literal["slot", "channel"], zeros: bool, dtype: torch.dtype, group: int
) -> None:
    page_size, d = 16, 40
    cache = make_cache(page_size, max_pages=3)
    generator = torch.Generator().manual_seed(5)
    pages = []
    for seed in (1, 2):
        if kind == "fp8":
            pages.append(random(cache.pages, page_size, d, seed=seed).to(torch.float8_e4m3fn))
            largest = 1.0
        elif kind == "int8":
            numbers = torch.randint(-127, 128, (cache.pages, page_size, d), generator=generator)
            pages.append(numbers.to(torch.int8))
            largest = 127.0
        else:
            numbers = torch.randint(0, 256, (cache.pages, page_size, d // 2), generator=generator)
            pages.append(numbers.to(torch.uint8))
            largest = 15.0
    k_shape = (cache.pages, page_size if key_axis == "slot" else d)
    k_scale, v_scale = (
        (1.5 + random(*shape, seed=7)) / 2.5 / largest for shape in (k_shape, (cache.pages, page_size))
    )
    k_zero, v_zero = random(*k_shape, seed=8), random(cache.pages, page_size, seed=9)
    v_scale, v_zero = poison(v_scale, cache), poison(v_zero, cache)
    if key_axis == "slot":
        k_scale, k_zero = poison(k_scale, cache), poison(k_zero, cache)
    scales = PageScales(
        key_axis=key_axis,
        k_scale=k_scale,
        v_scale=v_scale,
        k_zero=k_zero if zeros else None,
        v_zero=v_zero if zeros else None,
    )
    q = random(2, KV_HEADS * group, d, seed=0).to(dtype)
    k, v = pages
    expected = naive_pages.paged_decode(
        q, k, v, cache.tables, cache.lengths, scale=0.15, scales=scales, mass=True
    )
    found = triton.paged_decode(
        q, k, v, cache.tables, cache.lengths, scale=0.15, scales=scales, mass=True,
        splits=2, config=triton.Config(16),
    )  # fmt: skip
    assert_same(found, expected, TOLERANCE[dtype])


def test_oracle_equals_plain_attention() -> None:
    cache = make_cache(8)
    q = random(2, KV_HEADS * 3, 16, seed=0)
    k, v = (random(cache.pages, 8, 16, seed=seed) for seed in (1, 2))
    out, lse, mass = naive_pages.paged_decode(q, k, v, cache.tables, cache.lengths, scale=0.3, mass=True)
    assert mass is not None
    for sequence, head in ((0, 1), (1, 0), (1, 1)):
        length = int(cache.lengths[sequence, head])
        rows = q[sequence, head * 3 : head * 3 + 3]
        keys, values = (pages[cache.tables[sequence, head].long()].flatten(0, 1)[:length] for pages in (k, v))
        expected = functional.scaled_dot_product_attention(rows[None], keys[None], values[None], scale=0.3)[0]
        torch.testing.assert_close(out[sequence, head * 3 : head * 3 + 3], expected)
        weights = torch.softmax(rows @ keys.T * 0.3, -1)
        torch.testing.assert_close(mass[sequence, head, :length], weights.sum(0))
        assert mass[sequence, head, length:].eq(0).all()
        # the largest weight times exp(LSE) is exp of the largest score
        top = (rows @ keys.T * 0.3).max(-1).values
        torch.testing.assert_close(weights.max(-1).values.log() + lse[sequence, head * 3 : head * 3 + 3], top)


def test_dispatch_keeps_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(8)
    q = random(2, KV_HEADS * 4, 16, seed=0).half()
    k, v = (poison(random(cache.pages, 8, 16, seed=seed), cache).half() for seed in (1, 2))
    expected = naive_pages.paged_decode(q, k, v, cache.tables, cache.lengths, scale=0.3, mass=True)
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        found = paged_decode(q, k, v, cache.tables, cache.lengths, scale=0.3, mass=True)
        assert found.out.dtype == torch.float16
        assert_same(found, expected, 1e-3)


def test_splits_fill_the_device_and_no_more() -> None:
    assert triton.choose_splits(heads=256, max_slots=32768, block_slots=64, programs=528) == 3
    assert triton.choose_splits(heads=4, max_slots=32768, block_slots=64, programs=528) == 64
    assert triton.choose_splits(heads=4, max_slots=128, block_slots=64, programs=528) == 2
    assert triton.choose_splits(heads=1000, max_slots=128, block_slots=64, programs=528) == 1


def test_pages_and_blocks_have_to_fit() -> None:
    cache = make_cache(24)
    q, pages = random(2, 2, 16, seed=0), random(cache.pages, 24, 16, seed=1)
    with pytest.raises(AssertionError, match="divide"):
        triton.paged_decode(
            q, pages, pages, cache.tables, cache.lengths, scale=1.0, splits=1, config=triton.Config(16)
        )
    with pytest.raises(AssertionError, match="scales"):
        triton.paged_decode(
            q, pages.to(torch.int8), pages.to(torch.int8), cache.tables, cache.lengths, scale=1.0, splits=1
        )
