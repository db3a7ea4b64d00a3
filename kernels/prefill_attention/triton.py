"""Prefill attention on a GPU: one program per tile of an `AttentionIndex`, all its phases in one softmax.

Knows nothing about how an index was built, and trusts it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmserve.kernels.merge_lse.naive import Partial
from mmserve.kernels.prefill_attention.index import TILE_FIELDS, AttentionIndex

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """How one tile is walked."""

    block_keys: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_valid(ptr, valid):
    return tl.load(ptr) if valid is None else tl.load(ptr, mask=valid, other=0)


@triton.jit
def _load_keys(
    k_ptr, v_ptr, key, valid, axis, slot_ptr, table_ptr, stride_k, stride_v,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K and V of keys of one axis; a key that is not valid reads as 0, whatever its memory holds."""
    channel = tl.arange(0, BLOCK_D)
    if slot_ptr is not None:
        key = _load_valid(slot_ptr + axis + key, valid)
    if PAGE_SIZE > 0:
        page = _load_valid(table_ptr + key // PAGE_SIZE, valid)
        row = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
    else:
        row = axis + key
    mask = None
    if valid is not None:
        mask = valid[:, None]
    if BLOCK_D != D:
        mask = (channel < D)[None, :] if mask is None else mask & (channel < D)[None, :]
    k = _load_valid(k_ptr + row[:, None] * stride_k + channel[None, :], mask)
    v = _load_valid(v_ptr + row[:, None] * stride_v + channel[None, :], mask)
    return k, v


@triton.jit
def _visible(key, valid, axis, order_ptr, row_order):
    """Which rows see which keys."""
    if order_ptr is not None:
        key = _load_valid(order_ptr + axis + key, valid)
    seen = key[None, :] <= row_order[:, None]
    if valid is not None:
        seen &= valid[None, :]
    return seen


@triton.jit
def _attend(
    q, k, v, visible, real, m, total, acc, scale_log2, skip_log2, SKIP: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax; `visible` None means that every row sees every key."""
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    top = tl.max(s, 1)
    m_new = tl.maximum(m, top)
    # a row that has seen nothing yet must not subtract -inf from -inf
    m_safe = m_new if visible is None else tl.where(m_new > float("-inf"), m_new, 0.0)
    if SKIP:
        # no weight of this block exceeds the threshold times the largest of its row so far
        if tl.max(tl.where(real & (top > m + skip_log2), 1, 0), 0) > 0:
            alpha = tl.exp2(m - m_safe)
            p = tl.exp2(s - m_safe[:, None])
            total = total * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
    else:
        alpha = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return m, total, acc


@triton.jit
def prefill_attention_fwd_kernel(
    q_ptr,  # [rows, Hq, D]
    k_ptr,  # [keys, Hkv, D], or pages [pages, PAGE_SIZE, D] where PAGE_SIZE > 0
    v_ptr,
    k_desc,  # descriptors of k and v as [keys, Hkv * D] in blocks [BLOCK_N, D], or None
    v_desc,
    out_ptr,  # [rows, Hq, D]
    lse_ptr,  # fp32 [rows, Hq]
    tiles_ptr,
    rows_ptr,
    runs_ptr,
    blocks_ptr,
    columns_ptr,
    row_order_ptr,
    key_begin_ptr,
    key_order_ptr,
    key_slot_ptr,
    tables_ptr,  # int32 [sequences, Hkv, max_pages]
    scale_log2,
    skip_log2,
    stride_k,  # elements between the keys of one head
    stride_kh,  # and between the heads of one key
    stride_v,
    stride_vh,
    max_pages,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    sequence, head, row_count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3)
    if row_count == 0:
        return
    kv_head = head // GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP

    member = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    real = member < row_count
    row = tl.load(rows_ptr + tl.load(tile + 2) + member, mask=real, other=0)
    row_order = tl.load(row_order_ptr + row, mask=real, other=0)
    # every row sees the keys up to the order of the earliest: no mask there
    earliest = tl.min(tl.where(real, row_order, 2147483647), 0)
    row_at = row.to(tl.int64) * HEADS + head
    inside = real[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + row_at[:, None] * D + channel[None, :], mask=inside, other=0.0)

    axis = tl.load(key_begin_ptr + sequence * KV_HEADS + kv_head)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    if PAGE_SIZE > 0:
        tables_ptr += (sequence * KV_HEADS + kv_head).to(tl.int64) * max_pages
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    run_begin, run_count = tl.load(tile + 4), tl.load(tile + 5)
    for run in range(run_begin, run_begin + run_count):
        start, stride = tl.load(runs_ptr + run * 3), tl.load(runs_ptr + run * 3 + 1)
        length = tl.load(runs_ptr + run * 3 + 2)
        if key_order_ptr is None:
            free = tl.where(earliest < start, 0, tl.minimum((earliest - start) // stride + 1, length))
        else:
            free = length
        whole = free // BLOCK_N * BLOCK_N
        described = 0
        if k_desc is not None:
            described = tl.where(stride == 1, whole, 0)
            for at in range(0, described, BLOCK_N):
                k = k_desc.load([(axis + start + at).to(tl.int32), kv_head * D])
                v = v_desc.load([(axis + start + at).to(tl.int32), kv_head * D])
                seen = None
                if key_order_ptr is not None:
                    seen = _visible(start + at + place, None, axis, key_order_ptr, row_order)
                m, total, acc = _attend(
                    q, k, v, seen, real, m, total, acc, scale_log2, skip_log2, SKIP, PRECISION
                )  # fmt: skip
        for at in range(described, whole, BLOCK_N):
            key = start + (at + place) * stride
            k, v = _load_keys(
                k_ptr, v_ptr, key, None, axis, key_slot_ptr, tables_ptr,
                stride_k, stride_v, PAGE_SIZE, D, BLOCK_D,
            )  # fmt: skip
            seen = None
            if key_order_ptr is not None:
                seen = _visible(key, None, axis, key_order_ptr, row_order)
            m, total, acc = _attend(
                q, k, v, seen, real, m, total, acc, scale_log2, skip_log2, SKIP, PRECISION
            )  # fmt: skip
        # the diagonal and the ragged end
        for at in range(whole, length, BLOCK_N):
            key, valid = start + (at + place) * stride, at + place < length
            k, v = _load_keys(
                k_ptr, v_ptr, key, valid, axis, key_slot_ptr, tables_ptr,
                stride_k, stride_v, PAGE_SIZE, D, BLOCK_D,
            )  # fmt: skip
            seen = _visible(key, valid, axis, key_order_ptr, row_order)
            m, total, acc = _attend(
                q, k, v, seen, real, m, total, acc, scale_log2, skip_log2, SKIP, PRECISION
            )  # fmt: skip

    block_begin, block_count = tl.load(tile + 6), tl.load(tile + 7)
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    for at in range(0, block_count * PARTS):
        start = tl.load(blocks_ptr + block_begin + at // PARTS) * BLOCK_SIZE + at % PARTS * BLOCK_N
        if k_desc is not None:
            k = k_desc.load([(axis + start).to(tl.int32), kv_head * D])
            v = v_desc.load([(axis + start).to(tl.int32), kv_head * D])
        else:
            k, v = _load_keys(
                k_ptr, v_ptr, start + place, None, axis, key_slot_ptr, tables_ptr,
                stride_k, stride_v, PAGE_SIZE, D, BLOCK_D,
            )  # fmt: skip
        seen = _visible(start + place, None, axis, key_order_ptr, row_order)
        m, total, acc = _attend(
            q, k, v, seen, real, m, total, acc, scale_log2, skip_log2, SKIP, PRECISION
        )  # fmt: skip

    column_begin, column_count = tl.load(tile + 8), tl.load(tile + 9)
    for at in range(0, column_count, BLOCK_N):
        valid = at + place < column_count
        key = tl.load(columns_ptr + column_begin + at + place, mask=valid, other=0)
        k, v = _load_keys(
            k_ptr, v_ptr, key, valid, axis, key_slot_ptr, tables_ptr,
            stride_k, stride_v, PAGE_SIZE, D, BLOCK_D,
        )  # fmt: skip
        seen = _visible(key, valid, axis, key_order_ptr, row_order)
        m, total, acc = _attend(
            q, k, v, seen, real, m, total, acc, scale_log2, skip_log2, SKIP, PRECISION
        )  # fmt: skip

    # volatile: read again here, so that no registers hold the addresses throughout
    written = member < tl.load(tile + 3, volatile=True)
    row = tl.load(rows_ptr + tl.load(tile + 2) + member, mask=written, other=0, volatile=True)
    row_at = row.to(tl.int64) * HEADS + head
    # a row that saw nothing: 0 with LSE -inf
    total = tl.where(total > 0, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + row_at[:, None] * D + channel[None, :], out, mask=written[:, None] & (channel < D)[None, :]
    )
    tl.store(lse_ptr + row_at, (m + tl.log2(total)) * LN2, mask=written)


def default_config(d: int, itemsize: int, tile_rows: int, capability: int) -> Config:
    """What compiles without spills and within the shared memory of a chip (tests/kernels/test_aot.py)."""
    if itemsize == 4:
        # for checks, not for serving: it spills
        return Config(16, 8, 2)
    # tcgen05 leaves fewer registers to the rest
    shift = 1 if capability >= 100 else 0
    if d > 128:
        return Config(32 >> shift, 8, 2)
    return Config(64 >> shift if d > 64 else 64, 8 if tile_rows > 64 else 4, 3)


def default_tile_rows(d: int) -> int:
    """Rows per tile for which the accumulator stays in registers."""
    return 128 if d <= 128 else 64


def can_skip(capability: int) -> bool:
    """Triton 3.7 cannot compile the skipped product for tcgen05; there a threshold changes nothing."""
    return capability < 100


def constants(
    dtype: torch.dtype,
    *,
    d: int,
    kv_heads: int,
    group: int,
    tile_rows: int,
    block_size: int,
    page_size: int,
    skip: bool,
    config: Config,
) -> dict[str, object]:
    """What the kernel is compiled for; page_size 0 means contiguous K and V."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_M": max(16, triton.next_power_of_2(tile_rows)),
        "BLOCK_N": config.block_keys,
        "BLOCK_SIZE": block_size,
        "PAGE_SIZE": page_size,
        "TILE_FIELDS": TILE_FIELDS,
        "SKIP": skip,
        "PRECISION": "tf32x3" if dtype is torch.float32 else "tf32",
    }


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    *,
    scale: float,
    tables: Tensor | None = None,
    skip_threshold: float = 0.0,
    out: Partial | None = None,
    config: Config | None = None,
) -> Partial:
    """As `prefill_attention.prefill_attention`."""
    rows, q_heads, d = q.shape
    kv_heads = index.key_begin.shape[1]
    chip = _capability(q.device)
    config = config or default_config(d, q.itemsize, index.tile_rows, chip)
    _check(q, k, v, index, tables, config)
    assert 0 <= skip_threshold < 1, f"Expected a threshold in [0, 1), but got {skip_threshold}"
    assert scale > 0, f"Expected a positive scale, but got {scale}"
    if out is None:
        out = Partial(torch.empty_like(q), torch.empty(rows, q_heads, device=q.device))
    k_desc, v_desc = (_descriptor(kv, index, tables, config.block_keys) for kv in (k, v))
    if k_desc is None or v_desc is None:
        k_desc = v_desc = None
    strides = (d, 0, d, 0) if tables is not None else (*k.stride()[:2], *v.stride()[:2])
    if len(index.tiles):
        prefill_attention_fwd_kernel[(len(index.tiles),)](
            q, k, v, k_desc, v_desc, out.out, out.lse,
            index.tiles, index.rows, index.runs, index.blocks, index.columns, index.row_order,
            index.key_begin, index.key_order, index.key_slot, tables,
            scale * LOG2E, math.log2(skip_threshold) if skip_threshold else 0.0,
            *strides, 0 if tables is None else tables.shape[2],
            **constants(
                q.dtype, d=d, kv_heads=kv_heads, group=q_heads // kv_heads, tile_rows=index.tile_rows,
                block_size=index.block_size, page_size=0 if tables is None else k.shape[1],
                skip=skip_threshold > 0 and can_skip(chip), config=config,
            ),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def _descriptor(
    kv: Tensor, index: AttentionIndex, tables: Tensor | None, block_keys: int
) -> TensorDescriptor | None:
    """K or V as [keys, Hkv * d] for the tensor memory accelerator, where chip and layout allow it."""
    keys, kv_heads, d = kv.shape
    if tables is not None or index.key_slot is not None or _capability(kv.device) < 90:
        return None
    contiguous = keys > 0 and kv.stride()[1:] == (d, 1)
    aligned = kv.data_ptr() % 16 == 0 and kv.stride(0) * kv.itemsize % 16 == 0
    # a block of channels must end where the head ends
    if not contiguous or not aligned or d < 16 or d & (d - 1):
        return None
    return TensorDescriptor(kv, [keys, kv_heads * d], [kv.stride(0), 1], [block_keys, d])


@cache
def _capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100; the interpreter can do what any chip can."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _check(
    q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, tables: Tensor | None, config: Config
) -> None:
    """Invariants of a launch, from shapes alone."""
    sequences, kv_heads = index.key_begin.shape
    rows, q_heads, d = q.shape
    assert q.dtype == k.dtype == v.dtype, f"q, k and v differ: {q.dtype}, {k.dtype}, {v.dtype}"
    assert d in range(8, 257, 8), f"Expected 8 to 256 channels, a multiple of 8, but got {d}"
    assert k.shape == v.shape, f"K and V differ: {tuple(k.shape)}, {tuple(v.shape)}"
    assert k.shape[2] == d, f"Expected {d} channels of K, but got {k.shape[2]}"
    assert q.is_contiguous(), "q is contiguous"
    assert k.stride(2) == v.stride(2) == 1, "the channels of a key lie side by side"
    assert q_heads % kv_heads == 0, f"{q_heads} query heads, {kv_heads} KV heads"
    assert len(index.row_order) == rows, f"an index of {len(index.row_order)} rows for {rows}"
    # otherwise a step would leave its block
    assert not len(index.blocks) or index.block_size % config.block_keys == 0, "steps divide blocks"
    if tables is None:
        assert k.shape[1] == kv_heads, "K and V have the KV heads of the index"
        return
    assert k.is_contiguous(), "pages are contiguous"
    assert v.is_contiguous(), "pages are contiguous"
    assert tables.is_contiguous(), "tables are contiguous"
    assert tables.dtype == torch.int32, f"Expected int32 tables, but got {tables.dtype}"
    assert tables.shape[:2] == (sequences, kv_heads), "a table per sequence and KV head"
