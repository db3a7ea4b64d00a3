"""The page codec: its error bounds, the kernels in Triton's interpreter, and decode on their pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

from mmserve.kernels import kv_codec
from mmserve.kernels.kv_codec import QuantizedPages, cpu, empty_pages, naive, triton
from mmserve.kernels.paged_decode import naive_pages
from mmserve.kernels.paged_decode import triton as decode
from tests.kernels import bf16_shim

bf16_shim.install()
Array = NDArray[np.generic]
KINDS = ["int8", "int4", "fp8"]
AXES = ["slot", "channel"]
Kind = Literal["int8", "int4", "fp8"]
Axis = Literal["slot", "channel"]
PAGE_IDS = torch.tensor([4, 0, 6, 2], dtype=torch.int32)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _rounded_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest, as a GPU does: the interpreter loses the carry, so that 127.9 becomes 64."""
    convert = interpreter._convert_float

    def nearest(data: Array, source: object, target: object, rounding: object) -> Array:
        if str(source) != "fp32" or str(target) != "fp8e4nv":
            converted: Array = convert(data, source, target, rounding)
            return converted
        return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    """What a test loads depends on its environment."""
    cpu._kernel.cache_clear()
    yield
    cpu._kernel.cache_clear()


def largest_error(x: Tensor, kind: Kind, dim: int) -> Tensor:
    """The bound of README.md for numbers in groups along `dim`."""
    if kind == "int4":
        low, high = x.aminmax(dim=dim, keepdim=True)
        return (high - low) / 30 + low.abs() / 2048
    largest = x.abs().amax(dim, keepdim=True)
    if kind == "int8":
        return largest / 254
    return torch.maximum(x.abs() / 16, largest / 448 / 1024)


def assert_within(found: Tensor, x: Tensor, kind: Kind, dim: int) -> None:
    # scales are rounded to fp16
    bound = largest_error(x, kind, dim) * (1 + 2**-10) + 1e-6
    assert ((found - x).abs() <= bound).all()


def same_pages(found: QuantizedPages, expected: QuantizedPages) -> None:
    for name in ("k_scale", "v_scale", "k_zero", "v_zero"):
        one, other = (getattr(pages.scales, name) for pages in (found, expected))
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)
    for one, other in ((found.k, expected.k), (found.v, expected.v)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("page_size", "d"), [(8, 8), (6, 72)])
def test_stored_pages_stay_within_the_bound(
    kind: Kind, axis: Axis, page_size: int, d: int, dtype: torch.dtype
) -> None:
    counts = torch.tensor([page_size, page_size - 1, 1, 0], dtype=torch.int32)
    k, v = (normal(4, page_size, d, seed=seed).to(dtype) for seed in (0, 1))
    k[..., 3] *= 30
    k[0, 0] = 0
    k[0, :, 1] = 2.5
    for rows in (k, v):
        rows[torch.arange(page_size) >= counts[:, None]] = torch.nan
    expected, found = (empty_pages(kind, 7, page_size, d, key_axis=axis) for _ in range(2))
    naive.store_pages(expected, k, v, PAGE_IDS, counts)
    triton.store_pages(found, k, v, PAGE_IDS, counts)
    same_pages(found, expected)
    read_k, read_v = naive.load_pages(found, PAGE_IDS)
    for at, count in enumerate(counts.tolist()[:-1]):
        assert_within(read_k[at, :count], k[at, :count].float(), kind, 0 if axis == "channel" else 1)
        assert_within(read_v[at, :count], v[at, :count].float(), kind, 1)
    assert found.k[2].float().count_nonzero() == 0, "a page without slots stays as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_to_their_slots(kind: Kind) -> None:
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:19]
    slots[5] = -1
    k, v = (normal(19, 40, seed=seed).half() for seed in (3, 4))
    k[5] = torch.nan
    expected, found = (empty_pages(kind, 5, 8, 40, key_axis="slot") for _ in range(2))
    naive.store_slots(expected, k, v, slots)
    triton.store_slots(found, k, v, slots)
    same_pages(found, expected)
    assert found.scales.k_scale.isfinite().all()
    rows = naive.load_pages(found, torch.arange(5))[0].flatten(0, 1)
    kept = slots >= 0
    assert_within(rows[slots[kept]], k[kept].float(), kind, 1)
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[slots[kept]] = False
    assert rows[untouched].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_pages_equal_what_decode_reads(
    kind: Kind, axis: Axis, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = empty_pages(kind, 7, 20, 24, key_axis=axis)
    k, v = (normal(4, 20, 24, seed=seed) for seed in (5, 6))
    naive.store_pages(pages, k, v, PAGE_IDS, torch.full((4,), 20))
    expected = naive.load_pages(pages, PAGE_IDS)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    found = triton.load_pages(pages, PAGE_IDS, dtype)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(
            one.float(), other, atol=1e-6, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3
        )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_attends_to_what_was_stored(kind: Kind, axis: Axis) -> None:
    page_size, d, group = 16, 32, 4
    counts = torch.tensor([16, 16, 5], dtype=torch.int32)
    tables = torch.tensor([[[3, 0, 5]]], dtype=torch.int32)
    k, v = (normal(3, page_size, d, seed=seed).half() for seed in (7, 8))
    pages = empty_pages(kind, 6, page_size, d, key_axis=axis)
    triton.store_pages(pages, k, v, tables[0, 0], counts)
    lengths = torch.tensor([[37]], dtype=torch.int32)
    q = normal(1, group, d, seed=9).half()
    call = {"scale": d**-0.5, "scales": pages.scales}
    found = decode.paged_decode(
        q, pages.k, pages.v, tables, lengths, **call, splits=1, config=decode.Config(16)
    )
    expected = naive_pages.paged_decode(q, pages.k, pages.v, tables, lengths, **call)
    torch.testing.assert_close(found.out.float(), expected.out, atol=1e-3, rtol=0)
    plain = naive_pages.paged_decode(
        q, k, v, torch.tensor([[[0, 1, 2]]], dtype=torch.int32), lengths, scale=d**-0.5
    )
    assert (expected.out - plain.out).abs().max() < (0.3 if kind == "int4" else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [8, 16, 24, 80, 128])
def test_hadamard_equals_oracle(d: int, dtype: torch.dtype) -> None:
    x = normal(3, 5, d, seed=10).to(dtype)
    found, expected = triton.hadamard(x), naive.hadamard(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), expected, atol=1e-5, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3
    )


def test_hadamard_is_its_own_inverse_and_keeps_scores() -> None:
    q, k = normal(5, 48, seed=11), normal(6, 48, seed=12)
    torch.testing.assert_close(naive.hadamard(naive.hadamard(q)), q, atol=1e-5, rtol=0)
    torch.testing.assert_close(naive.hadamard(q) @ naive.hadamard(k).T, q @ k.T, atol=1e-4, rtol=0)
    matrix = naive.hadamard_matrix(48)
    assert torch.equal(matrix @ matrix, 16 * torch.eye(48))


def test_hadamard_helps_where_one_channel_stands_out() -> None:
    k = normal(64, 64, seed=13)
    k[:, 7] += 40
    slots, errors = torch.arange(64), []
    for rotate in (naive.hadamard, lambda rows: rows):
        pages = empty_pages("int4", 4, 16, 64, key_axis="slot")
        naive.store_slots(pages, rotate(k), k, slots)
        errors.append((rotate(naive.load_pages(pages, slots[:4])[0].flatten(0, 1)) - k).norm())
    assert errors[0] < errors[1] / 2


def test_keys_by_channel_are_stored_by_page() -> None:
    pages = empty_pages("int8", 1, 4, 8, key_axis="channel")
    rows = torch.zeros(1, 8)
    with pytest.raises(AssertionError, match="by page"):
        kv_codec.store_slots(pages, rows, rows, torch.zeros(1, dtype=torch.int64))


def test_dispatch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ids = normal(2, 4, 8, seed=14).half(), torch.tensor([2, 1], dtype=torch.int32)
    found = []
    for choice in ("naive", "interpret"):
        monkeypatch.setenv("MMSERVE_KERNELS", choice)
        pages = empty_pages("int8", 3, 4, 8, key_axis="slot")
        kv_codec.store_pages(pages, rows, rows, ids, torch.tensor([4, 2], dtype=torch.int32))
        kv_codec.store_slots(pages, rows[0], rows[0], torch.arange(4))
        k, v = kv_codec.load_pages(pages, ids, torch.float16)
        found.append(torch.stack([k, v, kv_codec.hadamard(k)]))
        assert k.dtype == v.dtype == torch.float16
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_nothing_is_no_launch() -> None:
    pages, none = empty_pages("int4", 1, 4, 8, key_axis="channel"), torch.zeros(0, dtype=torch.int32)
    triton.store_pages(pages, torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), none, none)
    assert triton.load_pages(pages, none, torch.float16)[0].shape == (0, 4, 8)
    assert triton.hadamard(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page_size", "d"), [(32, 64), (20, 40), (4, 8), (16, 256)])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_pages_equal_the_oracles_bit_by_bit(
    kind: Kind, axis: Axis, page_size: int, d: int, dtype: torch.dtype
) -> None:
    if cpu._kernel() is None:
        pytest.skip("no C compiler")
    sizes = torch.logspace(-4, 3, 6)[:, None, None]
    k, v = ((normal(6, page_size, d, seed=seed) * sizes).to(dtype) for seed in (15, 16))
    k[2, :, 3] *= 100
    k[0, :, 1], v[1, 0] = 2.5, 0
    ids = torch.tensor([5, 0, 7, 2, 1, 6], dtype=torch.int32)
    counts = torch.tensor([page_size, page_size - 1, 1, 0, page_size, 2], dtype=torch.int32)
    expected, found = (empty_pages(kind, 8, page_size, d, key_axis=axis) for _ in range(2))
    naive.store_pages(expected, k, v, ids, counts)
    assert cpu.try_store_pages(found, k, v, ids, counts)
    same_pages(found, expected)
    for name in ("k_scale", "v_scale"):
        assert torch.equal(getattr(found.scales, name), getattr(expected.scales, name))


def test_a_page_that_is_not_there_is_refused() -> None:
    pages, rows = empty_pages("int8", 2, 4, 8, key_axis="channel"), torch.zeros(1, 4, 8)
    for page, count in ((2, 4), (-1, 4), (0, 5)):
        ids, counts = (torch.tensor([number], dtype=torch.int32) for number in (page, count))
        with pytest.raises(AssertionError, match="pages are there"):
            cpu.try_store_pages(pages, rows, rows, ids, counts)
