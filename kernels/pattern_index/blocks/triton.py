"""Index building on a GPU: scores of blocks of rows. Knows nothing about tiles, patterns or budgets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.pattern_index.naive import Columns, last_orders
from mmserve.kernels.pattern_index.triton import checked, load_head, masked_scores

POOL_ROWS = 16
SCORE_TILE = 32
SELECT_TILE = (16, 64)


@triton.jit
def pool_rows_fwd_kernel(
    x_ptr,  # [rows, HEADS, D]
    out_ptr,  # [blocks, HEADS, D]
    rows,
    block,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POOL_ROWS: tl.constexpr,
):
    which, head = tl.program_id(0), tl.program_id(1)
    first, last = which * block, tl.minimum((which + 1) * block, rows)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, POOL_ROWS):
        row = start + tl.arange(0, POOL_ROWS)
        total += tl.sum(load_head(x_ptr, row, row < last, head, HEADS, D, BLOCK_D).to(tl.float32), 0)
    channel = tl.arange(0, BLOCK_D)
    at = out_ptr + (which.to(tl.int64) * HEADS + head) * D + channel
    tl.store(at, (total / (last - first)).to(out_ptr.dtype.element_ty), mask=channel < D)


@triton.jit
def block_scores_fwd_kernel(
    q_ptr,  # [row blocks, KV_HEADS * GROUP, D]: means
    k_ptr,  # [key blocks, KV_HEADS, D]: means
    row_order_ptr,  # int32 [row blocks]: of their last rows
    key_order_ptr,  # int32 [key blocks]: of their first keys
    scores_ptr,  # fp32 [KV_HEADS * GROUP, row blocks, key blocks]
    scale,
    rows,
    keys,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(2)
    key = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = load_head(q_ptr, row, row < rows, head, KV_HEADS * GROUP, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < rows, other=-1)
    s = masked_scores(
        q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale, KV_HEADS, D, BLOCK_D, PRECISION
    )
    at = scores_ptr + (head.to(tl.int64) * rows + row)[:, None] * keys + key[None, :]
    tl.store(at, s, mask=(row < rows)[:, None] & (key < keys)[None, :])


@triton.jit
def select_columns_fwd_kernel(
    q_ptr,  # [row blocks, KV_HEADS * GROUP, D]: means
    k_ptr,  # [keys, KV_HEADS, D]
    row_order_ptr,  # int32 [row blocks]: of their last rows
    key_order_ptr,  # int32 [keys] or None
    key_end_ptr,  # int32 [row blocks]
    columns_ptr,  # int32 [KV_HEADS * GROUP, row blocks, capacity]
    counts_ptr,  # int32 [KV_HEADS * GROUP, row blocks]
    scale,
    alpha,
    rows,
    keys,
    sink,
    capacity,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = load_head(q_ptr, row, row < rows, head, KV_HEADS * GROUP, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < rows, other=-1)
    key_end = tl.load(key_end_ptr + row, mask=row < rows, other=0)
    # a key's order is at least its place, so none is seen past the largest order
    stop = tl.minimum(keys, tl.max(row_order, 0) + 1)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for start in range(0, stop, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        s = masked_scores(
            q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale,
            KV_HEADS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(s, 1))
    threshold = tl.where(largest > float("-inf"), largest - alpha, 0.0)
    found = tl.zeros([BLOCK_ROWS], tl.int32)
    out = columns_ptr + (head.to(tl.int64) * rows + row)[:, None] * capacity
    for start in range(0, stop, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        s = masked_scores(
            q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale,
            KV_HEADS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        kept = (s >= threshold[:, None]) & (key >= sink)[None, :] & (key[None, :] < key_end[:, None])
        number = kept.to(tl.int32)
        place = found[:, None] + tl.cumsum(number, 1) - 1
        value = tl.broadcast_to(key[None, :], (BLOCK_ROWS, BLOCK_KEYS))
        tl.store(out + place, value, mask=kept & (place < capacity) & (row < rows)[:, None])
        found += tl.sum(number, 1)
    tl.store(counts_ptr + head * rows + row, tl.minimum(found, capacity), mask=row < rows)


def block_scores(
    q: Tensor,
    k: Tensor,
    row_order: Tensor,
    key_order: Tensor | None,
    *,
    block: int,
    key_block: int | None = None,
    scale: float,
) -> Tensor:
    """As `pattern_index.block_scores`; all tensors are contiguous."""
    settings = checked(q, k, row_order, key_order)
    key_block = key_block or block
    mean_q, mean_k = pool_rows(q, block), pool_rows(k, key_block)
    if key_order is None:
        first_keys = torch.arange(0, len(k), key_block, dtype=torch.int32, device=k.device)
    else:
        first_keys = key_order[::key_block].contiguous()
    rows, keys = len(mean_q), len(mean_k)
    scores = torch.empty(q.shape[1], rows, keys, dtype=torch.float32, device=q.device)
    block_scores_fwd_kernel[(triton.cdiv(keys, SCORE_TILE), triton.cdiv(rows, SCORE_TILE), q.shape[1])](
        mean_q, mean_k, last_orders(row_order, block), first_keys, scores, scale, rows, keys,
        TILE=SCORE_TILE, **settings, num_warps=4,
    )  # fmt: skip
    return scores


def select_columns(
    q: Tensor,
    k: Tensor,
    row_order: Tensor,
    key_order: Tensor | None,
    key_end: Tensor,
    *,
    block: int,
    scale: float,
    alpha: float,
    sink: int,
    capacity: int,
) -> Columns:
    """As `pattern_index.select_columns`; all tensors are contiguous."""
    settings = checked(q, k, row_order, key_order)
    assert key_end.dtype == torch.int32, "ends are int32"
    assert len(key_end) == triton.cdiv(len(q), block), "one end per block"
    mean_q, heads = pool_rows(q, block), q.shape[1]
    rows = len(mean_q)
    counts = torch.empty(heads, rows, dtype=torch.int32, device=q.device)
    columns = torch.empty(heads, rows, capacity, dtype=torch.int32, device=q.device)
    select_columns_fwd_kernel[(triton.cdiv(rows, SELECT_TILE[0]), heads)](
        mean_q, k, last_orders(row_order, block), key_order, key_end, columns, counts,
        scale, alpha, rows, len(k), sink, capacity,
        BLOCK_ROWS=SELECT_TILE[0], BLOCK_KEYS=SELECT_TILE[1], **settings, num_warps=4,
    )  # fmt: skip
    return Columns(columns, counts)


def pool_rows(x: Tensor, block: int) -> Tensor:
    """As `naive.pool_rows`, in x's dtype."""
    rows, heads, d = x.shape
    out = torch.empty(triton.cdiv(rows, block), heads, d, dtype=x.dtype, device=x.device)
    pool_rows_fwd_kernel[(len(out), heads)](
        x, out, rows, block,
        HEADS=heads, D=d, BLOCK_D=triton.next_power_of_2(d), POOL_ROWS=POOL_ROWS, num_warps=4,
    )  # fmt: skip
    return out
