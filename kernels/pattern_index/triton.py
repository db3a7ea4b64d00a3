"""Index building on a GPU. Knows nothing about tiles, patterns or budgets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.pattern_index.naive import Columns, Probe, Residues, last_orders

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
PROBE_ROWS = 64
BLOCK_KEYS = 64
# keys of one program of the first pass over them
SPLIT_KEYS = 4096
RESIDUE_TILE = (16, 64)
POOL_ROWS = 16
SCORE_TILE = 32
SELECT_TILE = (16, 64)


@triton.jit
def _load_head(ptr, row, inside, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [rows, D] of one head of a tensor [N, HEADS, D]."""
    channel = tl.arange(0, BLOCK_D)
    at = ptr + (row.to(tl.int64) * HEADS + head)[:, None] * D + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _key_orders(key_order_ptr, key, inside):
    order = key
    if key_order_ptr is not None:
        order = tl.load(key_order_ptr + key, mask=inside, other=0)
    return order


@triton.jit
def _scores(
    q, k_ptr, row_order, key_order_ptr, key, keys, head, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled scores of rows with keys, -inf where a row does not see a key."""
    inside = key < keys
    k = _load_head(k_ptr, key, inside, head, KV_HEADS, D, BLOCK_D)
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale
    order = _key_orders(key_order_ptr, key, inside)
    return tl.where(inside[None, :] & (order[None, :] <= row_order[:, None]), s, float("-inf"))


@triton.jit
def probe_lse_fwd_kernel(
    q_ptr,  # [ROWS, KV_HEADS * GROUP, D]
    k_ptr,  # [keys, KV_HEADS, D]
    row_order_ptr,  # int32 [ROWS]
    key_order_ptr,  # int32 [keys] or None
    lse_ptr,  # fp32 [splits, KV_HEADS * GROUP, ROWS], natural
    scale_log2,
    keys,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, head = tl.program_id(0), tl.program_id(1)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    row = tl.arange(0, BLOCK_ROWS)
    q = _load_head(q_ptr, row, row < ROWS, head, HEADS, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < ROWS, other=-1)
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(split * SPLIT_KEYS, tl.minimum((split + 1) * SPLIT_KEYS, keys), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        s = _scores(
            q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale_log2,
            KV_HEADS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new > float("-inf"), m_new, 0.0)
        total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
        m = m_new
    lse = (m + tl.log2(tl.where(total > 0, total, 1.0))) * LN2
    tl.store(lse_ptr + (split * HEADS + head) * ROWS + row, lse, mask=row < ROWS)


@triton.jit
def probe_sums_fwd_kernel(
    q_ptr,  # [ROWS, KV_HEADS * GROUP, D]
    k_ptr,  # [keys, KV_HEADS, D]
    row_order_ptr,  # int32 [ROWS]
    key_order_ptr,  # int32 [keys] or None
    lse_ptr,  # fp32 [KV_HEADS * GROUP, ROWS], natural
    vertical_ptr,  # fp32 [KV_HEADS * GROUP, keys]
    # fp32 [KV_HEADS * GROUP, blocks, BLOCK_KEYS]: diagonal key - row = w of a block, and w - BLOCK_KEYS
    diagonal_ptr,
    wrapped_ptr,
    scale_log2,
    keys,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    row, place = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_KEYS)
    key = block * BLOCK_KEYS + place
    q = _load_head(q_ptr, row, row < ROWS, head, HEADS, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < ROWS, other=-1)
    s = _scores(
        q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale_log2,
        KV_HEADS, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    lse = tl.load(lse_ptr + head * ROWS + row, mask=row < ROWS, other=0.0) / LN2
    p = tl.exp2(s - tl.where(lse > float("-inf"), lse, 0.0)[:, None])
    wide_head = head.to(tl.int64)
    tl.store(vertical_ptr + wide_head * keys + key, tl.sum(p, 0), mask=key < keys)
    # turn each row left by its number: diagonals become columns
    turned = tl.gather(p, (place[None, :] + row[:, None]) % BLOCK_KEYS, 1)
    ahead = place[None, :] + row[:, None] < BLOCK_KEYS
    at = (wide_head * tl.num_programs(0) + block) * BLOCK_KEYS + place
    tl.store(diagonal_ptr + at, tl.sum(tl.where(ahead, turned, 0.0), 0))
    tl.store(wrapped_ptr + at, tl.sum(tl.where(ahead, 0.0, turned), 0))


@triton.jit
def residue_scores_fwd_kernel(
    vertical_ptr,  # fp32 [heads, keys]
    strides_ptr,  # int32 [strides]
    lift_ptr,  # fp32 [heads, strides]
    residue_ptr,  # int32 [heads, strides]
    keys,
    first,
    last,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RESIDUES: tl.constexpr,
):
    stride = tl.load(strides_ptr + tl.program_id(0))
    mass = vertical_ptr + tl.program_id(1).to(tl.int64) * keys
    rows = keys // stride
    best, best_residue, total = -1.0, 0, 0.0
    for start in range(0, stride, BLOCK_RESIDUES):
        residue = start + tl.arange(0, BLOCK_RESIDUES)
        sums = tl.zeros([BLOCK_RESIDUES], tl.float32)
        for row_start in range(0, rows, BLOCK_ROWS):
            row = row_start + tl.arange(0, BLOCK_ROWS)
            column = row[:, None] * stride + residue[None, :]
            counted = (row < rows)[:, None] & (residue < stride)[None, :]
            counted = counted & (column >= first) & (column < last)
            sums += tl.sum(tl.load(mass + column, mask=counted, other=0.0), 0)
        total += tl.sum(sums, 0)
        sums = tl.where(residue < stride, sums, -1.0)
        largest = tl.max(sums, 0)
        # of equal classes the first
        found = tl.min(tl.where(sums == largest, residue, stride), 0)
        best_residue = tl.where(largest > best, found, best_residue)
        best = tl.maximum(best, largest)
    share = tl.where(total > 0, best / tl.where(total > 0, total, 1.0), 0.0)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(lift_ptr + at, share - 1.0 / stride)
    tl.store(residue_ptr + at, best_residue)


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
        total += tl.sum(_load_head(x_ptr, row, row < last, head, HEADS, D, BLOCK_D).to(tl.float32), 0)
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
    q = _load_head(q_ptr, row, row < rows, head, KV_HEADS * GROUP, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < rows, other=-1)
    s = _scores(
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
    q = _load_head(q_ptr, row, row < rows, head, KV_HEADS * GROUP, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < rows, other=-1)
    key_end = tl.load(key_end_ptr + row, mask=row < rows, other=0)
    # a key's order is at least its place, so none is seen past the largest order
    stop = tl.minimum(keys, tl.max(row_order, 0) + 1)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for start in range(0, stop, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        s = _scores(
            q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale, KV_HEADS, D, BLOCK_D, PRECISION
        )
        largest = tl.maximum(largest, tl.max(s, 1))
    threshold = tl.where(largest > float("-inf"), largest - alpha, 0.0)
    found = tl.zeros([BLOCK_ROWS], tl.int32)
    out = columns_ptr + (head.to(tl.int64) * rows + row)[:, None] * capacity
    for start in range(0, stop, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        s = _scores(
            q, k_ptr, row_order, key_order_ptr, key, keys, head // GROUP, scale, KV_HEADS, D, BLOCK_D, PRECISION
        )
        kept = (s >= threshold[:, None]) & (key >= sink)[None, :] & (key[None, :] < key_end[:, None])
        number = kept.to(tl.int32)
        place = found[:, None] + tl.cumsum(number, 1) - 1
        value = tl.broadcast_to(key[None, :], (BLOCK_ROWS, BLOCK_KEYS))
        tl.store(out + place, value, mask=kept & (place < capacity) & (row < rows)[:, None])
        found += tl.sum(number, 1)
    tl.store(counts_ptr + head * rows + row, tl.minimum(found, capacity), mask=row < rows)


def head_constants(dtype: torch.dtype, d: int, kv_heads: int, group: int) -> dict[str, object]:
    """What the kernels that multiply are compiled for."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }


def probe(q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None, *, scale: float) -> Probe:
    """As `pattern_index.probe`; all tensors are contiguous."""
    rows, keys = len(q), len(k)
    assert 0 < rows <= min(PROBE_ROWS, keys), "1 to 64 rows, of the axis"
    settings = _checked(q, k, row_order, key_order)
    heads, new = q.shape[1], {"device": q.device, "dtype": torch.float32}
    block_rows = max(16, triton.next_power_of_2(rows))
    parts = torch.empty(triton.cdiv(keys, SPLIT_KEYS), heads, rows, **new)
    shape = {"ROWS": rows, "BLOCK_ROWS": block_rows, "BLOCK_KEYS": BLOCK_KEYS, "num_warps": 4}
    call = (q, k, row_order, key_order)
    probe_lse_fwd_kernel[(len(parts), heads)](
        *call, parts, scale * LOG2E, keys, SPLIT_KEYS=SPLIT_KEYS, **shape, **settings
    )
    vertical, blocks = torch.empty(heads, keys, **new), triton.cdiv(keys, BLOCK_KEYS)
    diagonal, wrapped = (torch.empty(heads, blocks, BLOCK_KEYS, **new) for _ in range(2))
    probe_sums_fwd_kernel[(blocks, heads)](
        *call, torch.logsumexp(parts, 0), vertical, diagonal, wrapped, scale * LOG2E, keys, **shape, **settings
    )
    # key - row from -BLOCK_KEYS on; what wraps around in a block belongs to the one before
    sums = torch.zeros(heads, blocks + 1, BLOCK_KEYS, **new)
    sums[:, 1:] = diagonal
    sums[:, :-1] += wrapped
    # the first row stands at keys - rows
    start = BLOCK_KEYS - rows + 1
    return Probe(vertical, sums.view(heads, -1)[:, start : start + keys].flip(-1))


def residue_scores(vertical: Tensor, strides: Tensor, *, first: int, last: int) -> Residues:
    """As `pattern_index.residue_scores`; all tensors are contiguous."""
    heads, keys = vertical.shape
    assert vertical.is_contiguous() and vertical.dtype == torch.float32, "sums are fp32"
    assert strides.is_contiguous() and strides.dtype == torch.int32, "strides are int32"
    lift = torch.empty(heads, len(strides), device=vertical.device, dtype=torch.float32)
    residue = torch.empty(lift.shape, device=vertical.device, dtype=torch.int32)
    if lift.numel():
        residue_scores_fwd_kernel[(len(strides), heads)](
            vertical, strides, lift, residue, keys, first, last,
            BLOCK_ROWS=RESIDUE_TILE[0], BLOCK_RESIDUES=RESIDUE_TILE[1], num_warps=4,
        )  # fmt: skip
    return Residues(lift, residue)


def block_scores(
    q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None, *, block: int, scale: float
) -> Tensor:
    """As `pattern_index.block_scores`; all tensors are contiguous."""
    settings = _checked(q, k, row_order, key_order)
    mean_q, mean_k = pool_rows(q, block), pool_rows(k, block)
    if key_order is None:
        first_keys = torch.arange(0, len(k), block, dtype=torch.int32, device=k.device)
    else:
        first_keys = key_order[::block].contiguous()
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
    settings = _checked(q, k, row_order, key_order)
    assert key_end.dtype == torch.int32 and len(key_end) == triton.cdiv(len(q), block), "one end per block"
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


def _checked(q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None) -> dict[str, object]:
    """Invariants of a launch, from shapes alone, and what it is compiled for."""
    heads, kv_heads, d = q.shape[1], k.shape[1], q.shape[2]
    assert q.is_contiguous() and k.is_contiguous() and k.shape[2] == d <= 256, "q and k fit each other"
    assert heads % kv_heads == 0 and len(q) > 0 and len(k) > 0, "heads fit, and there are rows and keys"
    assert row_order.dtype == torch.int32 and row_order.shape == q.shape[:1], "one order per row"
    assert key_order is None or (key_order.dtype == torch.int32 and key_order.shape == k.shape[:1]), "and key"
    return head_constants(q.dtype, d, kv_heads, heads // kv_heads)
