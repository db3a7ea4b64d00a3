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
from mmserve.kernels.prefill_attention.tile.triton import (
    attend_blocks,
    attend_columns,
    attend_runs,
    load_rows,
    store_rows,
)

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """How one tile is walked."""

    block_keys: int
    num_warps: int
    num_stages: int


# one compilation for all numbers of heads
@triton.jit(do_not_specialize=["kv_heads", "group"])
def prefill_attention_fwd_kernel(
    q_ptr,  # [rows, Hq, D]
    k_ptr, v_ptr,  # [keys, Hkv, D], or pages [pages, PAGE_SIZE, D] where PAGE_SIZE > 0
    k_desc, v_desc,  # descriptors of k and v as [keys, Hkv * D] in blocks [BLOCK_N, D], or None
    out_ptr, lse_ptr,  # [rows, Hq, D] and fp32 [rows, Hq]
    tiles_ptr, rows_ptr, runs_ptr, blocks_ptr, columns_ptr, row_order_ptr,
    key_begin_ptr, key_order_ptr, key_slot_ptr,
    tables_ptr,  # int32 [sequences, Hkv, max_pages]
    scale_log2, skip_log2,
    stride_k, stride_kh, stride_v, stride_vh,  # elements between the keys of a head, and the heads of a key
    max_pages, kv_heads, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE_FIELDS: tl.constexpr,
    SPARSE: tl.constexpr,  # whether there are blocks or columns
    SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    sequence, head = tl.load(tile), tl.load(tile + 1)
    if tl.load(tile + 3) == 0:
        return
    kv_head, heads = head // group, kv_heads * group
    q, rows = load_rows(q_ptr, tile, rows_ptr, row_order_ptr, head, heads, D, BLOCK_D, BLOCK_M)
    axis = tl.load(key_begin_ptr + sequence * kv_heads + kv_head)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    if PAGE_SIZE > 0:
        tables_ptr += (sequence * kv_heads + kv_head).to(tl.int64) * max_pages
    storage = (k_ptr, v_ptr, axis, key_order_ptr, key_slot_ptr, tables_ptr, stride_k, stride_v)
    described = (k_desc, v_desc, kv_head * D)
    factors = (scale_log2, skip_log2)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    state = (m, total, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
    state = attend_runs(
        q, rows, storage, described, tile, runs_ptr, state, factors,
        BLOCK_N, PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION,
    )  # fmt: skip
    if SPARSE:
        state = attend_blocks(
            q, rows, storage, described, tile, blocks_ptr, state, factors, BLOCK_SIZE,
            BLOCK_N, PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION,
        )  # fmt: skip
        state = attend_columns(
            q, rows, storage, tile, columns_ptr, state, factors,
            BLOCK_N, PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION,
        )  # fmt: skip
    store_rows(out_ptr, lse_ptr, tile, rows_ptr, head, heads, state, D, BLOCK_D, BLOCK_M)


def default_config(d: int, itemsize: int, tile_rows: int, capability: int, *, skip: bool = False) -> Config:
    """What compiles without spills and within the shared memory of a chip (tests/kernels/test_aot.py)."""
    if itemsize == 4:
        # three products for one
        return Config(16, 8, 2)
    if d <= 16:
        # ptxas grants few registers to kernels as small as these
        return Config(32, 8 if tile_rows > 64 else 4, 3)
    # tcgen05 leaves fewer registers to the rest
    shift = 1 if capability >= 100 else 0
    if d > 128:
        return Config(32 >> shift, 8, 2)
    # to skip a product takes registers too
    stages = 2 if skip and capability < 90 else 3
    return Config(64 >> shift if d > 64 else 64, 8 if tile_rows > 64 else 4, stages)


def default_tile_rows(d: int, itemsize: int = 2) -> int:
    """Rows per tile for which the accumulator stays in registers."""
    if itemsize == 4:
        return 64 if d <= 64 else 32
    return 128 if d <= 128 else 64


def can_skip(capability: int) -> bool:
    """Triton 3.7 cannot compile the skipped product for tcgen05; there a threshold changes nothing."""
    return capability < 100


def constants(
    dtype: torch.dtype,
    *,
    d: int,
    tile_rows: int,
    block_size: int,
    page_size: int,
    sparse: bool,
    skip: bool,
    config: Config,
) -> dict[str, object]:
    """What the kernel is compiled for; page_size 0 means contiguous K and V, `sparse` blocks or columns."""
    return {
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_M": max(16, triton.next_power_of_2(tile_rows)),
        "BLOCK_N": config.block_keys,
        "BLOCK_SIZE": block_size,
        "PAGE_SIZE": page_size,
        "TILE_FIELDS": TILE_FIELDS,
        "SPARSE": sparse,
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
    skip = skip_threshold > 0 and can_skip(chip)
    config = config or default_config(d, q.itemsize, index.tile_rows, chip, skip=skip)
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
            *strides, 0 if tables is None else tables.shape[2], kv_heads, q_heads // kv_heads,
            **constants(
                q.dtype, d=d, tile_rows=index.tile_rows, block_size=index.block_size,
                page_size=0 if tables is None else k.shape[1],
                sparse=len(index.blocks) + len(index.columns) > 0,
                skip=skip, config=config,
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
