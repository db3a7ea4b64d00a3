"""The page codec on a GPU. Knows nothing about tables, sequences or positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.kv_codec.naive import page_slots
from mmserve.kernels.kv_codec.pages import LARGEST, QuantizedPages

BLOCK_ROWS = 16
HADAMARD_ROWS = 64


@triton.jit
def _scale_of(low, high, LARGEST: tl.constexpr, ZEROS: tl.constexpr):
    """Scale, its inverse and zero of groups from their smallest and largest numbers, as fp16 holds them."""
    if ZEROS:
        scale = (high - low) / LARGEST
        zero = low.to(tl.float16).to(tl.float32)
    else:
        scale = tl.maximum(high, -low) / LARGEST
        zero = tl.zeros_like(low)
    scale = scale.to(tl.float16).to(tl.float32)
    # a group of equal numbers has no steps
    real = scale > 0
    return scale, tl.where(real, 1.0 / tl.where(real, scale, 1.0), 0.0), zero


@triton.jit
def _rounded(scaled, LARGEST: tl.constexpr, ZEROS: tl.constexpr, FLOAT: tl.constexpr):
    low: tl.constexpr = 0.0 if ZEROS else -LARGEST
    if not FLOAT:
        scaled = tl.floor(scaled + 0.5)
    return tl.minimum(tl.maximum(scaled, low), LARGEST)


@triton.jit
def store_rows_fwd_kernel(
    x_ptr,  # [rows, D], D = 2 * HALF
    slots_ptr,  # int64 [rows]
    pages_ptr,  # [slots, D], int4: [slots, HALF]
    scale_ptr,  # fp16 [slots]
    zero_ptr,  # fp16 [slots] or None
    rows,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LARGEST: tl.constexpr,
    INT4: tl.constexpr,
    FLOAT: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_HALF)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    kept = slot >= 0
    inside = kept[:, None] & (channel < HALF)[None, :]
    at = x_ptr + row.to(tl.int64)[:, None] * D + channel[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    infinity = float("inf")
    low = tl.min(tl.where(inside, tl.minimum(first, second), infinity), 1)
    high = tl.max(tl.where(inside, tl.maximum(first, second), -infinity), 1)
    scale, inverse, zero = _scale_of(tl.where(kept, low, 0.0), tl.where(kept, high, 0.0), LARGEST, INT4)
    first = _rounded((first - zero[:, None]) * inverse[:, None], LARGEST, INT4, FLOAT)
    second = _rounded((second - zero[:, None]) * inverse[:, None], LARGEST, INT4, FLOAT)
    if INT4:
        byte = first.to(tl.uint8) | (second.to(tl.uint8) << 4)
        tl.store(pages_ptr + slot[:, None] * HALF + channel[None, :], byte, mask=inside)
    else:
        dtype = pages_ptr.dtype.element_ty
        stored = pages_ptr + slot[:, None] * D + channel[None, :]
        tl.store(stored, first.to(dtype), mask=inside)
        tl.store(stored + HALF, second.to(dtype), mask=inside)
    tl.store(scale_ptr + slot, scale, mask=kept)
    if zero_ptr is not None:
        tl.store(zero_ptr + slot, zero, mask=kept)


@triton.jit
def _channel_numbers(
    at, inside, scale_at, zero_at, known, LARGEST: tl.constexpr, INT4: tl.constexpr, FLOAT: tl.constexpr
):
    """The numbers [slots, channels] of one half of a page, after their scales are written."""
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, x, float("inf")), 0)
    high = tl.max(tl.where(inside, x, float("-inf")), 0)
    scale, inverse, zero = _scale_of(tl.where(known, low, 0.0), tl.where(known, high, 0.0), LARGEST, INT4)
    tl.store(scale_at, scale, mask=known)
    if zero_at is not None:
        tl.store(zero_at, zero, mask=known)
    return _rounded((x - zero[None, :]) * inverse[None, :], LARGEST, INT4, FLOAT)


@triton.jit
def store_channels_fwd_kernel(
    x_ptr,  # [n, PAGE_SIZE, D], D = 2 * HALF
    page_ids_ptr,  # int32 [n]
    counts_ptr,  # int32 [n]
    pages_ptr,  # [pages, PAGE_SIZE, D], int4: [pages, PAGE_SIZE, HALF]
    scale_ptr,  # fp16 [pages, D]
    zero_ptr,  # fp16 [pages, D] or None
    PAGE_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    LARGEST: tl.constexpr,
    INT4: tl.constexpr,
    FLOAT: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    which = tl.program_id(0)
    page = tl.load(page_ids_ptr + which).to(tl.int64)
    count = tl.load(counts_ptr + which)
    slot = tl.arange(0, BLOCK_SLOTS)
    channel = tl.arange(0, BLOCK_HALF)
    # a page without slots keeps its scales
    known = (channel < HALF) & (count > 0)
    inside = (slot < count)[:, None] & (channel < HALF)[None, :]
    at = x_ptr + (which.to(tl.int64) * PAGE_SIZE + slot)[:, None] * D + channel[None, :]
    scale_at = scale_ptr + page * D + channel
    zero_at = None
    second_zero_at = None
    if zero_ptr is not None:
        zero_at = zero_ptr + page * D + channel
        second_zero_at = zero_at + HALF
    first = _channel_numbers(at, inside, scale_at, zero_at, known, LARGEST, INT4, FLOAT)
    second = _channel_numbers(at + HALF, inside, scale_at + HALF, second_zero_at, known, LARGEST, INT4, FLOAT)
    stored = page * PAGE_SIZE + slot
    if INT4:
        byte = first.to(tl.uint8) | (second.to(tl.uint8) << 4)
        tl.store(pages_ptr + stored[:, None] * HALF + channel[None, :], byte, mask=inside)
    else:
        dtype = pages_ptr.dtype.element_ty
        stored_at = pages_ptr + stored[:, None] * D + channel[None, :]
        tl.store(stored_at, first.to(dtype), mask=inside)
        tl.store(stored_at + HALF, second.to(dtype), mask=inside)


@triton.jit
def load_pages_fwd_kernel(
    pages_ptr,  # [pages, PAGE_SIZE, D], int4: [pages, PAGE_SIZE, HALF]
    scale_ptr,  # fp16 [pages, PAGE_SIZE], by channel [pages, D]
    zero_ptr,  # like scale, or None
    page_ids_ptr,  # int32 [n]
    out_ptr,  # [n, PAGE_SIZE, D], D = 2 * HALF
    PAGE_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    INT4: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    which = tl.program_id(0).to(tl.int64)
    page = tl.load(page_ids_ptr + which).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    channel = tl.arange(0, BLOCK_HALF)
    inside = (slot < PAGE_SIZE)[:, None] & (channel < HALF)[None, :]
    stored = (page * PAGE_SIZE + slot)[:, None]
    out_at = out_ptr + (which * PAGE_SIZE + slot)[:, None] * D + channel[None, :]
    if INT4:
        byte = tl.load(pages_ptr + stored * HALF + channel[None, :], mask=inside, other=0)
    for half in tl.static_range(2):
        if INT4:
            x = (byte >> 4 if half == 1 else byte & 15).to(tl.float32)
        else:
            at = pages_ptr + stored * D + half * HALF + channel[None, :]
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if BY_CHANNEL:
            scaled_at = page * D + half * HALF + channel[None, :]
            scaled = (channel < HALF)[None, :]
        else:
            scaled_at = stored
            scaled = (slot < PAGE_SIZE)[:, None]
        x *= tl.load(scale_ptr + scaled_at, mask=scaled, other=0.0)
        if zero_ptr is not None:
            x += tl.load(zero_ptr + scaled_at, mask=scaled, other=0.0)
        tl.store(out_at + half * HALF, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def hadamard_fwd_kernel(
    x_ptr,  # [rows, D]
    out_ptr,  # [rows, D]
    scale,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOW_BITS: tl.constexpr,  # size of a block - 1
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * D + channel[None, :], mask=inside, other=0.0)
    # the sign is the parity of the bits that row and column of a block share
    both = channel[:, None] & channel[None, :] & LOW_BITS
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    same = (channel[:, None] | LOW_BITS) == (channel[None, :] | LOW_BITS)
    signs = tl.where(same, 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0).to(x.dtype)
    turned = tl.dot(x, signs, input_precision=PRECISION) * scale
    out = out_ptr + row[:, None] * D + channel[None, :]
    tl.store(out, turned.to(out_ptr.dtype.element_ty), mask=inside)


def constants(dtype: torch.dtype, d: int) -> dict[str, object]:
    """What the kernels that store are compiled for."""
    return {
        "HALF": d // 2,
        "BLOCK_HALF": triton.next_power_of_2(d // 2),
        "LARGEST": LARGEST[dtype],
        "INT4": dtype is torch.uint8,
        "FLOAT": dtype.is_floating_point,
    }


def hadamard_constants(dtype: torch.dtype, d: int) -> dict[str, object]:
    return {
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "LOW_BITS": (d & -d) - 1,
        "BLOCK_ROWS": HADAMARD_ROWS,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def store_slots(pages: QuantizedPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """As `kv_codec.store_slots`; all tensors are contiguous."""
    scales = pages.scales
    _store_rows(pages.k, scales.k_scale, scales.k_zero, k, slots)
    _store_rows(pages.v, scales.v_scale, scales.v_zero, v, slots)


def store_pages(pages: QuantizedPages, k: Tensor, v: Tensor, page_ids: Tensor, counts: Tensor) -> None:
    """As `kv_codec.store_pages`; all tensors are contiguous."""
    page_size, d, scales = k.shape[1], k.shape[2], pages.scales
    assert page_ids.dtype == counts.dtype == torch.int32, "page_ids and counts are int32"
    slots = page_slots(page_ids, counts, page_size).view(-1)
    _store_rows(pages.v, scales.v_scale, scales.v_zero, v.view(-1, d), slots)
    if scales.key_axis == "slot":
        _store_rows(pages.k, scales.k_scale, scales.k_zero, k.view(-1, d), slots)
        return
    assert k.is_contiguous(), "k is contiguous"
    assert pages.width == d, "k fits the pages"
    assert pages.k.shape[1] == page_size, "k fits the pages"
    if len(page_ids):
        store_channels_fwd_kernel[(len(page_ids),)](
            k, page_ids, counts, pages.k, scales.k_scale, scales.k_zero,
            PAGE_SIZE=page_size, BLOCK_SLOTS=triton.next_power_of_2(page_size),
            **constants(pages.k.dtype, d), num_warps=4,
        )  # fmt: skip


def load_pages(pages: QuantizedPages, page_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kv_codec.load_pages`."""
    scales = pages.scales
    by_channel = scales.key_axis == "channel"
    return (
        _load(pages, pages.k, scales.k_scale, scales.k_zero, page_ids, dtype, by_channel),
        _load(pages, pages.v, scales.v_scale, scales.v_zero, page_ids, dtype, False),
    )


def hadamard(x: Tensor) -> Tensor:
    """As `kv_codec.hadamard`; x is contiguous."""
    d = x.shape[-1]
    assert x.is_contiguous(), "x is contiguous"
    assert d <= 256, f"Expected up to 256 channels, but got {d}"
    out = torch.empty_like(x)
    if x.numel():
        hadamard_fwd_kernel[(triton.cdiv(x.numel() // d, HADAMARD_ROWS),)](
            x, out, (d & -d) ** -0.5, x.numel() // d, **hadamard_constants(x.dtype, d), num_warps=4
        )
    return out


def _store_rows(pages: Tensor, scale: Tensor, zero: Tensor | None, rows: Tensor, slots: Tensor) -> None:
    count, d = rows.shape
    for tensor in (rows, pages, slots):
        assert tensor.is_contiguous(), "every tensor is contiguous"
    assert slots.dtype == torch.int64, "slots are int64, one per row"
    assert slots.shape == (count,), "slots are int64, one per row"
    assert pages.shape[2] * (2 if pages.dtype is torch.uint8 else 1) == d, "rows fit the pages"
    assert d % 2 == 0, f"Expected an even number of channels, but got {d}"
    if count:
        store_rows_fwd_kernel[(triton.cdiv(count, BLOCK_ROWS),)](
            rows, slots, pages, scale, zero, count,
            BLOCK_ROWS=BLOCK_ROWS, **constants(pages.dtype, d), num_warps=4,
        )  # fmt: skip


def _load(
    pages: QuantizedPages,
    stored: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    page_ids: Tensor,
    dtype: torch.dtype,
    by_channel: bool,
) -> Tensor:
    page_size, d = stored.shape[1], pages.width
    assert page_ids.dtype == torch.int32, "page_ids are int32"
    assert page_ids.is_contiguous(), "page_ids are contiguous"
    out = torch.empty(len(page_ids), page_size, d, dtype=dtype, device=stored.device)
    if len(page_ids):
        load_pages_fwd_kernel[(len(page_ids), triton.cdiv(page_size, BLOCK_ROWS))](
            stored, scale, zero, page_ids, out,
            PAGE_SIZE=page_size, BLOCK_SLOTS=BLOCK_ROWS, HALF=d // 2,
            BLOCK_HALF=triton.next_power_of_2(d // 2), BY_CHANNEL=by_channel,
            INT4=stored.dtype is torch.uint8, num_warps=4,
        )  # fmt: skip
    return out
