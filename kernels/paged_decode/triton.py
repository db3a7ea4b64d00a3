"""Split-KV decode attention on a GPU. Knows nothing about who owns a page.

The grid depends on shapes alone and lengths are read on the device, so a launch can be captured in a graph.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.merge_lse.triton import merge_lse
from mmserve.kernels.paged_decode.naive_pages import Decoded, PageScales

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
MAX_SPLITS = 64
MASS_SLOTS = 128
# programs per multiprocessor that a launch aims at
WAVES = 4


class Config(NamedTuple):
    """How one launch is cut."""

    block_slots: int
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _unpack(bytes, HIGH: tl.constexpr, dtype: tl.constexpr):
    """One half of the channels of int4 pages."""
    return (bytes >> 4 if HIGH else bytes & 15).to(tl.float32).to(dtype)


@triton.jit
def _locate(
    tables_ptr, head, max_pages, start, slot, valid, PAGE_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    """The page of a block, or those of its slots, and where its slots are stored."""
    table = tables_ptr + head.to(tl.int64) * max_pages
    if BLOCK_SLOTS <= PAGE_SIZE:
        # the block lies in one page: PAGE_SIZE is a multiple of it
        page = tl.load(table + start // PAGE_SIZE).to(tl.int64)
        stored = page * PAGE_SIZE + start % PAGE_SIZE + tl.arange(0, BLOCK_SLOTS)
    else:
        page = tl.load(table + slot // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        stored = page * PAGE_SIZE + slot % PAGE_SIZE
    return page, stored


@triton.jit
def _load_slots(ptr, stored, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What is stored in slots; those that are not valid may hold anything, nan too."""
    channel = tl.arange(0, BLOCK_D)
    at = stored[:, None] * D + channel[None, :]
    return tl.load(ptr + at, mask=valid[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _scaled(q, scale_ptr, at, known):
    """Queries for keys that are scaled by channel."""
    scale = tl.load(scale_ptr + at, mask=known, other=0.0)
    return (q.to(tl.float32) * scale[None, :]).to(q.dtype)


@triton.jit
def _channel_zeros(q, zero_ptr, at, known):
    """What the zeros of a page's channels add to all its scores."""
    zero = tl.load(zero_ptr + at, mask=known, other=0.0)
    return tl.sum(q.to(tl.float32) * zero[None, :], 1)


@triton.jit
def _scores(
    q, q_high, k, scale_ptr, zero_ptr, page, stored, valid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INT4: tl.constexpr, KEY_AXIS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw scores of a block, with the scales and zeros of its keys."""
    channel = tl.arange(0, BLOCK_D)
    known = channel < D
    query, query_high = q, q_high
    if KEY_AXIS == 2:
        at = page * (2 * D if INT4 else D) + channel
        query = _scaled(q, scale_ptr, at, known)
        if INT4:
            query_high = _scaled(q_high, scale_ptr, at + D, known)
    if INT4:
        s = tl.dot(query, _unpack(k, False, q.dtype).T, input_precision=PRECISION)
        s = tl.dot(query_high, _unpack(k, True, q.dtype).T, s, input_precision=PRECISION)
    else:
        s = tl.dot(query, k.to(q.dtype).T, input_precision=PRECISION)
    if KEY_AXIS == 1:
        s *= tl.load(scale_ptr + stored, mask=valid, other=0.0)[None, :]
    if zero_ptr is not None:
        if KEY_AXIS == 1:
            # a zero of a slot adds the same to all its channels
            sums = tl.sum(q.to(tl.float32), 1)
            if INT4:
                sums += tl.sum(q_high.to(tl.float32), 1)
            s += sums[:, None] * tl.load(zero_ptr + stored, mask=valid, other=0.0)[None, :]
        else:
            added = _channel_zeros(q, zero_ptr, at, known)
            if INT4:
                added += _channel_zeros(q_high, zero_ptr, at + D, known)
            s += added[:, None]
    return s


@triton.jit
def _weights(s, m, total):
    """Weights of a block, what earlier ones are worth now, and the softmax's new state."""
    # every block has a valid slot, so m is finite
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    return p, alpha, m_new, total * alpha + tl.sum(p, 1)


@triton.jit
def _accumulate(p, v, acc, alpha, PRECISION: tl.constexpr):
    return tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)


@triton.jit
def _store_split(
    out_ptr, lse_ptr, row, channel, m, total, acc, acc_high, shift, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_G: tl.constexpr, INT4: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Outputs and LSE of one split; if SHIFTED, the zeros of values add to all channels."""
    real = tl.arange(0, BLOCK_G) < GROUP
    inside = real[:, None] & (channel < D)[None, :]
    seen = tl.where(total > 0, total, 1.0)
    written = tl.program_id(1) * tl.num_programs(0).to(tl.int64) * GROUP + row
    out_at = out_ptr + written[:, None] * (2 * D if INT4 else D) + channel[None, :]
    if SHIFTED:
        acc += shift[:, None]
    tl.store(out_at, (acc / seen[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if INT4:
        if SHIFTED:
            acc_high += shift[:, None]
        tl.store(out_at + D, (acc_high / seen[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + written, (m + tl.log2(seen)) * LN2, mask=real)


@triton.jit
def paged_decode_fwd_kernel(
    q_ptr,  # [B, Hkv * GROUP, D]
    k_ptr, v_ptr,  # [pages, PAGE_SIZE, D], int4: [pages, PAGE_SIZE, D / 2]
    k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr,
    tables_ptr, lengths_ptr,  # int32 [B, Hkv, max_pages] and [B, Hkv]
    out_ptr, lse_ptr,  # [splits, B, Hkv * GROUP, D] and fp32 [splits, B, Hkv * GROUP]
    scores_ptr,  # fp32 [B, Hkv, GROUP, max_pages * PAGE_SIZE] in units of log 2, or None
    scale_log2, max_pages,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,  # channels, of one half where INT4
    PAGE_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INT4: tl.constexpr,
    KEY_AXIS: tl.constexpr,  # 0: not scaled, 1: by slot, 2: by channel
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)  # sequence * Hkv + KV head
    length = tl.load(lengths_ptr + head)
    share = tl.cdiv(tl.cdiv(length, BLOCK_SLOTS), tl.num_programs(1)) * BLOCK_SLOTS
    first = tl.program_id(1) * share
    member = tl.arange(0, BLOCK_G)
    channel = tl.arange(0, BLOCK_D)
    row = head.to(tl.int64) * GROUP + member
    inside = (member < GROUP)[:, None] & (channel < D)[None, :]
    q_at = q_ptr + row[:, None] * (2 * D if INT4 else D) + channel[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    m, total = tl.full([BLOCK_G], float("-inf"), tl.float32), tl.zeros([BLOCK_G], tl.float32)
    shift = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    q_high, acc_high = q, acc
    if INT4:
        q_high = tl.load(q_at + D, mask=inside, other=0.0)
        acc_high = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + share, length), BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        valid = slot < length
        page, stored = _locate(tables_ptr, head, max_pages, start, slot, valid, PAGE_SIZE, BLOCK_SLOTS)
        k = _load_slots(k_ptr, stored, valid, D, BLOCK_D)
        v = _load_slots(v_ptr, stored, valid, D, BLOCK_D)
        s = _scores(
            q, q_high, k, k_scale_ptr, k_zero_ptr, page, stored, valid, D, BLOCK_D, INT4, KEY_AXIS, PRECISION
        )
        s = tl.where(valid[None, :], s * scale_log2, float("-inf"))
        if scores_ptr is not None:
            scores = scores_ptr + row[:, None] * (max_pages * PAGE_SIZE) + slot[None, :]
            tl.store(scores, s, mask=(member < GROUP)[:, None] & valid[None, :])
        p, alpha, m, total = _weights(s, m, total)
        if v_zero_ptr is not None:
            v_zero = tl.load(v_zero_ptr + stored, mask=valid, other=0.0)
            shift = shift * alpha + tl.sum(p * v_zero[None, :], 1)
        if KEY_AXIS != 0:
            p *= tl.load(v_scale_ptr + stored, mask=valid, other=0.0)[None, :]
        p = p.to(q.dtype)
        if INT4:
            acc = _accumulate(p, _unpack(v, False, q.dtype), acc, alpha, PRECISION)
            acc_high = _accumulate(p, _unpack(v, True, q.dtype), acc_high, alpha, PRECISION)
        else:
            acc = _accumulate(p, v.to(q.dtype), acc, alpha, PRECISION)
    _store_split(
        out_ptr, lse_ptr, row, channel, m, total, acc, acc_high, shift,
        GROUP, D, BLOCK_G, INT4, v_zero_ptr is not None,
    )  # fmt: skip


@triton.jit
def attention_mass_fwd_kernel(
    scores_ptr,  # fp32 [B, Hkv, GROUP, slots], in units of log 2
    lse_ptr,  # fp32 [B, Hkv, GROUP]
    lengths_ptr,  # int32 [B, Hkv]
    mass_ptr,  # fp32 [B, Hkv, slots]
    slots,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    member = tl.arange(0, BLOCK_G)
    row = head * GROUP + member
    known = (member < GROUP)[:, None] & (slot < tl.load(lengths_ptr + head))[None, :]
    lse = tl.load(lse_ptr + row, mask=member < GROUP, other=0.0) / LN2
    at = row[:, None] * slots + slot[None, :]
    scores = tl.load(scores_ptr + at, mask=known, other=float("-inf"))
    # a head without slots has no weights: its LSE is -inf, all its scores too
    weights = tl.exp2(scores - tl.where(lse > float("-inf"), lse, 0.0)[:, None])
    tl.store(mass_ptr + head * slots + slot, tl.sum(weights, 0), mask=slot < slots)


def default_config(page_size: int, scales: PageScales | None, itemsize: int = 2) -> Config:
    """Blocks of 64 slots; with keys scaled by channel a block is a page, since each page has its own.

    itemsize is that of the queries: products in fp32 take more registers.
    """
    block = page_size if scales is not None and scales.key_axis == "channel" else 64
    return Config(block, num_warps=8 if itemsize == 4 else 4)


def constants(
    q_dtype: torch.dtype,
    page_dtype: torch.dtype,
    *,
    d: int,
    group: int,
    page_size: int,
    scales: PageScales | None,
    config: Config,
) -> dict[str, object]:
    """What the kernel is compiled for."""
    int4 = page_dtype is torch.uint8
    width = d // 2 if int4 else d
    return {
        "GROUP": group,
        "BLOCK_G": max(16, triton.next_power_of_2(group)),
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "PAGE_SIZE": page_size,
        "BLOCK_SLOTS": config.block_slots,
        "INT4": int4,
        "KEY_AXIS": 0 if scales is None else ("slot", "channel").index(scales.key_axis) + 1,
        "PRECISION": "tf32x3" if q_dtype is torch.float32 else "tf32",
    }


@cache
def _programs(device: torch.device) -> int:
    """How many programs keep a device busy; the interpreter runs one at a time."""
    if device.type != "cuda":
        return WAVES
    return WAVES * int(torch.cuda.get_device_properties(device).multi_processor_count)


def choose_splits(heads: int, max_slots: int, block_slots: int, programs: int) -> int:
    """Enough programs for the device, none without a block at full length; from shapes alone."""
    return max(1, min(-(-programs // heads), -(-max_slots // block_slots), MAX_SPLITS))


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    scales: PageScales | None = None,
    mass: bool = False,
    splits: int | None = None,
    config: Config | None = None,
) -> Decoded:
    """As `paged_decode.paged_decode`."""
    batch, kv_heads, max_pages = tables.shape
    q_heads, d = q.shape[1:]
    page_size = k_pages.shape[1]
    config = config or default_config(page_size, scales, q.itemsize)
    _check(q, k_pages, v_pages, tables, lengths, scales, config)
    heads, group = batch * kv_heads, q_heads // kv_heads
    if splits is None:
        splits = choose_splits(heads, max_pages * page_size, config.block_slots, _programs(q.device))
    parts = torch.empty(splits, *q.shape, device=q.device, dtype=q.dtype if splits == 1 else torch.float32)
    lses = torch.empty(splits, batch, q_heads, device=q.device)
    scores = torch.empty(heads, group, max_pages * page_size, device=q.device) if mass else None
    compiled_for = constants(
        q.dtype,
        k_pages.dtype,
        d=d,
        group=group,
        page_size=page_size,
        scales=scales,
        config=config,
    )
    scaled: tuple[Tensor | None, ...] = (None,) * 4
    if scales is not None:
        scaled = (scales.k_scale, scales.k_zero, scales.v_scale, scales.v_zero)
    if heads:
        paged_decode_fwd_kernel[(heads, splits)](
            q, k_pages, v_pages, *scaled, tables, lengths, parts, lses, scores, scale * LOG2E, max_pages,
            **compiled_for, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if splits == 1:
        out, lse = parts[0], lses[0]
    else:
        out, lse = merge_lse(parts, lses, out=torch.empty_like(q))
    return Decoded(out, lse, None if scores is None else _mass(scores, lse, lengths))


def _mass(scores: Tensor, lse: Tensor, lengths: Tensor) -> Tensor:
    heads, group, slots = scores.shape
    mass = torch.empty(*lengths.shape, slots, device=scores.device)
    if mass.numel():
        attention_mass_fwd_kernel[(heads, triton.cdiv(slots, MASS_SLOTS))](
            scores, lse, lengths, mass, slots,
            GROUP=group, BLOCK_G=triton.next_power_of_2(group), BLOCK_SLOTS=MASS_SLOTS,
        )  # fmt: skip
    return mass


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scales: PageScales | None,
    config: Config,
) -> None:
    """Invariants of a launch, from shapes alone."""
    page_size, width = k_pages.shape[1:]
    q_heads, d = q.shape[1:]
    block = config.block_slots
    for tensor in (q, k_pages, v_pages, tables, lengths):
        assert tensor.is_contiguous(), "every tensor is contiguous"
    assert k_pages.shape == v_pages.shape, f"K and V differ: {k_pages.shape}, {v_pages.shape}"
    assert k_pages.dtype == v_pages.dtype, f"K and V differ: {k_pages.dtype}, {v_pages.dtype}"
    assert tables.dtype == lengths.dtype == torch.int32, "tables and lengths are int32"
    assert d in range(8, 257, 8), f"Expected 8 to 256 channels, a multiple of 8, but got {d}"
    assert width == (d // 2 if k_pages.dtype is torch.uint8 else d), f"pages of {width} for {d} channels"
    assert q_heads % tables.shape[1] == 0, f"{q_heads} query heads, {tables.shape[1]} KV heads"
    assert lengths.shape == tables.shape[:2], "a length per table"
    assert page_size < block or page_size % block == 0, f"blocks of {block} divide pages of {page_size}"
    if scales is None:
        assert k_pages.dtype in (torch.float32, torch.float16, torch.bfloat16), "other pages need scales"
    elif scales.key_axis == "channel":
        # every page has its own scales
        assert block <= page_size, f"Expected a block in one page of {page_size}, but got {block}"
