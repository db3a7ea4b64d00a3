"""Index building on a GPU: the probe and its strides. Knows nothing about tiles, patterns or budgets."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmserve.kernels.pattern_index.naive import Probe, Residues

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
PROBE_ROWS = 64
BLOCK_KEYS = 64
# keys of one program of the first pass over them
SPLIT_KEYS = 4096
RESIDUE_TILE = (16, 64)


@triton.jit
def load_head(ptr, row, inside, head, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
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
def masked_scores(
    q, k_ptr, row_order, key_order_ptr, key, keys, head, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled scores of rows with keys, -inf where a row does not see a key."""
    inside = key < keys
    k = load_head(k_ptr, key, inside, head, KV_HEADS, D, BLOCK_D)
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
    q = load_head(q_ptr, row, row < ROWS, head, HEADS, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < ROWS, other=-1)
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(split * SPLIT_KEYS, tl.minimum((split + 1) * SPLIT_KEYS, keys), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        s = masked_scores(
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
    q = load_head(q_ptr, row, row < ROWS, head, HEADS, D, BLOCK_D)
    row_order = tl.load(row_order_ptr + row, mask=row < ROWS, other=-1)
    s = masked_scores(
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
    settings = checked(q, k, row_order, key_order)
    heads, new = q.shape[1], partial(torch.empty, device=q.device, dtype=torch.float32)
    block_rows = max(16, triton.next_power_of_2(rows))
    parts = new(triton.cdiv(keys, SPLIT_KEYS), heads, rows)
    shape = {"ROWS": rows, "BLOCK_ROWS": block_rows, "BLOCK_KEYS": BLOCK_KEYS, "num_warps": 4}
    call = (q, k, row_order, key_order)
    probe_lse_fwd_kernel[(len(parts), heads)](
        *call, parts, scale * LOG2E, keys, SPLIT_KEYS=SPLIT_KEYS, **shape, **settings
    )
    vertical, blocks = new(heads, keys), triton.cdiv(keys, BLOCK_KEYS)
    diagonal, wrapped = (new(heads, blocks, BLOCK_KEYS) for _ in range(2))
    probe_sums_fwd_kernel[(blocks, heads)](
        *call, torch.logsumexp(parts, 0), vertical, diagonal, wrapped, scale * LOG2E, keys,
        **shape, **settings,
    )  # fmt: skip
    # key - row from -BLOCK_KEYS on; what wraps around in a block belongs to the one before
    sums = new(heads, blocks + 1, BLOCK_KEYS).zero_()
    sums[:, 1:] = diagonal
    sums[:, :-1] += wrapped
    # the first row stands at keys - rows
    start = BLOCK_KEYS - rows + 1
    return Probe(vertical, sums.view(heads, -1)[:, start : start + keys].flip(-1))


def residue_scores(vertical: Tensor, strides: Tensor, *, first: int, last: int) -> Residues:
    """As `pattern_index.residue_scores`; all tensors are contiguous."""
    heads, keys = vertical.shape
    assert vertical.is_contiguous(), "sums are contiguous"
    assert vertical.dtype == torch.float32, "sums are fp32"
    assert strides.is_contiguous(), "strides are contiguous"
    assert strides.dtype == torch.int32, "strides are int32"
    lift = torch.empty(heads, len(strides), device=vertical.device, dtype=torch.float32)
    residue = torch.empty(lift.shape, device=vertical.device, dtype=torch.int32)
    if lift.numel():
        residue_scores_fwd_kernel[(len(strides), heads)](
            vertical, strides, lift, residue, keys, first, last,
            BLOCK_ROWS=RESIDUE_TILE[0], BLOCK_RESIDUES=RESIDUE_TILE[1], num_warps=4,
        )  # fmt: skip
    return Residues(lift, residue)


def checked(q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None) -> dict[str, object]:
    """Invariants of a launch, from shapes alone, and what it is compiled for."""
    heads, kv_heads, d = q.shape[1], k.shape[1], q.shape[2]
    assert q.is_contiguous(), "q is contiguous"
    assert k.is_contiguous(), "k is contiguous"
    assert k.shape[2] == d <= 256, f"Expected keys of {d} channels, up to 256, but got {k.shape[2]}"
    assert heads % kv_heads == 0, f"{heads} query heads, {kv_heads} KV heads"
    assert len(q) > 0, "there are rows"
    assert len(k) > 0, "there are keys"
    assert row_order.dtype == torch.int32, "one order per row"
    assert row_order.shape == q.shape[:1], "one order per row"
    assert key_order is None or (key_order.dtype == torch.int32 and key_order.shape == k.shape[:1]), "and key"
    return head_constants(q.dtype, d, kv_heads, heads // kv_heads)
